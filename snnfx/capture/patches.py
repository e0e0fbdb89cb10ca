"""What has to be replaced in Python and torch while a step is recorded, each for the time of the trace only."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from snnfx.capture.proxy import StepProxy
from snnfx.capture.recorder import Recorder
from snnfx.ops.step_functions import FunctionHolder, apply_autograd_function
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.leaf_modules import is_leaf

__all__ = [
    "WatchedFlag",
    "autocast_state",
    "patched_apply",
    "patched_factories",
    "patched_isinstance",
    "plain_isinstance",
    "quiet_fake_tensors",
    "watched_training_flag",
]

_FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "arange", "eye", "linspace", "randint", "randperm")
_RANDOM_FACTORIES = ("rand", "randn", "randint", "randperm")


@contextlib.contextmanager
def patched_apply(recorder: Recorder) -> Iterator[None]:
    """While tracing, `SomeFunction.apply(proxy)` records one node instead of running the forward on proxies.

    Modules often keep `spike = SomeFunction.apply`, a method that is bound already, so it is no use to put another
    function into its place: the function gets other code.
    """

    def record(cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recorder.is_evaluating or not any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs))):
            return _original_apply(cls, *args, **kwargs)
        holder = next(
            (h for h in recorder.constants.values() if isinstance(h, FunctionHolder) and h.function is cls), None
        )
        holder_proxy = recorder.proxy(recorder.constant(holder or FunctionHolder(cls)))
        return recorder.create_proxy("call_function", apply_autograd_function, (holder_proxy, *args), kwargs)

    outer_record = vars(torch.autograd.Function).get("snnfx_record_apply")
    outer_code = _APPLY.__code__
    torch.autograd.Function.snnfx_record_apply = classmethod(record)
    _APPLY.__code__ = _RecordingApply.apply.__code__
    try:
        yield
    finally:
        _APPLY.__code__ = outer_code
        if outer_record is None:
            del torch.autograd.Function.snnfx_record_apply
        else:
            torch.autograd.Function.snnfx_record_apply = outer_record


_APPLY = torch.autograd.Function.__dict__["apply"].__func__
_original_apply = types.FunctionType(_APPLY.__code__, _APPLY.__globals__, closure=_APPLY.__closure__)


class _RecordingApply:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """The code of `torch.autograd.Function.apply` during a trace; it runs with the globals of torch's module."""
        super  # noqa: B018 - it makes the cell `__class__`, which torch's code has too, so that one can replace the other
        return cls.snnfx_record_apply(args, kwargs)


@contextlib.contextmanager
def patched_isinstance() -> Iterator[None]:
    """While tracing, `isinstance(proxy, Tensor)` in Python code says what it would say of the value.

    A proxy cannot claim it through `__class__`: torch's C++ code would believe it and read memory that is not there.
    """
    original = builtins.isinstance

    def isinstance_of_value(value: Any, cls: Any) -> bool:
        return original(value, cls) or (type(value) is StepProxy and value.stands_for(cls))

    builtins.isinstance = isinstance_of_value
    try:
        yield
    finally:
        builtins.isinstance = original


_ISINSTANCE = builtins.isinstance
_TORCH = os.path.dirname(torch.__file__) + os.sep


@contextlib.contextmanager
def plain_isinstance() -> Iterator[None]:
    """Python's own `isinstance` inside `patched_isinstance`, where no proxy is met: torch calls it very often."""
    patched, builtins.isinstance = builtins.isinstance, _ISINSTANCE
    try:
        yield
    finally:
        builtins.isinstance = patched


class WatchedFlag:
    """Stands for `training` in nn.Module and remembers whether anybody but torch's own layers looked at it."""

    def __init__(self) -> None:
        self.was_read = False

    def __get__(self, module: nn.Module | None, cls: type) -> Any:
        if module is None or "training" not in module.__dict__:
            raise AttributeError("training")
        if not self.was_read:
            reader = sys._getframe(1).f_code.co_filename
            self.was_read = not is_leaf(module) or not reader.startswith(_TORCH)
        return module.__dict__["training"]

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


@contextlib.contextmanager
def watched_training_flag(model: nn.Module) -> Iterator[WatchedFlag]:
    """Notice whether what is recorded may depend on the mode; layers look at their own flag when they are called."""
    watch = WatchedFlag()
    # A class with a flag of its own hides the one that is watched.
    classes = {c for m in model.modules() for c in type(m).__mro__} - {nn.Module}
    watch.was_read = any("training" in vars(c) for c in classes)
    nn.Module.training = watch  # type: ignore[assignment]
    try:
        yield watch
    finally:
        del nn.Module.training


@contextlib.contextmanager
def patched_factories(recorder: Recorder) -> Iterator[None]:
    """While tracing, `torch.zeros(x.shape[0], 4)` records one node: C++ does not take a proxy for a size.

    `torch.rand(5)` does so whatever its size: drawn for real, the numbers would be the same in every call of the net.
    """
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            proxies = any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs)))
            if recorder.is_evaluating or not (proxies or original.__name__ in _RANDOM_FACTORIES):
                return original(*args, **kwargs)
            return recorder.create_proxy("call_function", original, args, kwargs)

        return factory

    try:
        for name, original in originals.items():
            setattr(torch, name, recording(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """While tracing, torch does not log the errors of fake tensors: they are raised, with the user's line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def autocast_state() -> tuple[bool, ...]:
    """Whether autocast is on, for each kind of device."""
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
