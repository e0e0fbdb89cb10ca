"""Temporary patches of Python and torch during a trace."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from snnfx.capture.proxy import StepProxy
from snnfx.capture.recorder import Recorder
from snnfx.ops.step_functions import FunctionHolder, apply_autograd_function
from snnfx.sandbox.torch_internals import intercepted_apply, pytree
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
    """Record `SomeFunction.apply(proxy)` as one node instead of running its forward on proxies.

    Modules often store the bound method, `spike = SomeFunction.apply`, so a new attribute `apply` would not reach them:
    the existing function gets new code.
    """

    def has_proxies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return not recorder.is_evaluating and any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs)))

    def record(cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        holder = next(
            (h for h in recorder.constants.values() if isinstance(h, FunctionHolder) and h.function is cls), None
        )
        holder_proxy = recorder.proxy(recorder.constant(holder or FunctionHolder(cls)))
        return recorder.create_proxy("call_function", apply_autograd_function, (holder_proxy, *args), kwargs)

    with intercepted_apply(has_proxies, record):
        yield


@contextlib.contextmanager
def patched_isinstance() -> Iterator[None]:
    """Make `isinstance(proxy, Tensor)` answer for the recorded value.

    Setting `__class__` on the proxy is not an option: torch's C++ code would treat it as a tensor and read invalid
    memory.
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
    """Restore Python's `isinstance` inside `patched_isinstance` where no proxies occur; torch calls it very often."""
    patched, builtins.isinstance = builtins.isinstance, _ISINSTANCE
    try:
        yield
    finally:
        builtins.isinstance = patched


class WatchedFlag:
    """Descriptor for `nn.Module.training` that detects reads by code other than torch's layers."""

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
    """Detect whether the graph may depend on the mode; torch's layers read their own flag at each call instead."""
    flag = WatchedFlag()
    # A class attribute `training` would hide the descriptor.
    classes = {c for m in model.modules() for c in type(m).__mro__} - {nn.Module}
    flag.was_read = any("training" in vars(c) for c in classes)
    nn.Module.training = flag  # type: ignore[assignment]
    try:
        yield flag
    finally:
        del nn.Module.training


@contextlib.contextmanager
def patched_factories(recorder: Recorder) -> Iterator[None]:
    """Record tensor factories: torch's C++ code does not accept a proxy as a size in `torch.zeros(x.shape[0], 4)`.

    Random factories such as `torch.rand(5)` are always recorded; otherwise every call of the net would use the numbers
    drawn during the trace.
    """
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            has_proxies = any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs)))
            if recorder.is_evaluating or not (has_proxies or original.__name__ in _RANDOM_FACTORIES):
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
    """Silence torch's log of fake tensor errors; capture raises them with the user's line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def autocast_state() -> tuple[bool, ...]:
    """Whether autocast is enabled, for each device type."""
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
