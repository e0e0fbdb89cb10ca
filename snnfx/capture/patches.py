"""Patches of Python and torch during a trace; other threads get the results of the original functions."""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from snnfx.capture.proxy import StepProxy
from snnfx.capture.recorder import Recorder
from snnfx.capture.unsupported_modules import refuse_scripted_code
from snnfx.ops.operator_lookup import operations_with, traits_of_function
from snnfx.ops.step_functions import FunctionHolder, apply_autograd_function
from snnfx.sandbox.torch_internals import intercepted_apply, python_of_script, pytree
from snnfx.sandbox.user_code import format_location, user_location

__all__ = [
    "autocast_state",
    "patched_apply",
    "patched_factories",
    "patched_isinstance",
    "patched_script_functions",
    "patched_size_arguments",
    "plain_isinstance",
]


@contextlib.contextmanager
def patched_apply(recorder: Recorder) -> Iterator[None]:
    """Record `SomeFunction.apply(proxy)` as one node instead of running its forward on proxies."""

    def wants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return not recorder.is_evaluating and any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs)))

    def has_proxies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return not recorder.is_evaluating and any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs)))

    def record(cls: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        holder = next(
            (h for h in recorder.constants.values() if isinstance(h, FunctionHolder) and h.function is cls), None
        )
        holder_proxy = recorder.proxy(recorder.constant(holder or FunctionHolder(cls)))
        return recorder.create_proxy("call_function", apply_autograd_function, (holder_proxy, *args), kwargs)

    with intercepted_apply(wants, record):
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


@contextlib.contextmanager
def plain_isinstance() -> Iterator[None]:
    """Restore Python's `isinstance` inside `patched_isinstance` where no proxies occur; torch calls it very often."""
    patched, builtins.isinstance = builtins.isinstance, _ISINSTANCE
    try:
        yield
    finally:
        builtins.isinstance = patched


_TENSOR = torch.tensor
_CONVERSIONS = (_TENSOR, torch.as_tensor, torch.asarray)
"""Factories that take a tensor or numbers."""


def _converted(
    recorder: Recorder, factory: Callable[..., Any], data: Any, dtype: Any = None, device: Any = None, **options: Any
) -> Any:
    """`torch.as_tensor(data, ...)` for recorded data, as operations that have batch rules and kernels."""
    if any(options.values()):
        raise TypeError(f"{factory.__name__}() of recorded data takes dtype and device, not {', '.join(options)}")
    given = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    if type(data) is not StepProxy or not data.stands_for(torch.Tensor):
        return recorder.create_proxy("call_function", _TENSOR, (data,), given)
    if factory is _TENSOR:
        data = data.detach().clone()
    return data.to(**given) if given else data


@contextlib.contextmanager
def patched_factories(recorder: Recorder) -> Iterator[None]:
    """Record tensor factories: torch's C++ code does not accept a proxy as a size in `torch.zeros(x.shape[0], 4)`.

    Random factories such as `torch.rand(5)` are always recorded; otherwise every call of the net would use the numbers
    drawn during the trace.
    """
    torch.overrides.get_overridable_functions()  # torch keeps its tables for good: they must have the originals
    originals = {name: getattr(torch, name) for name in (*operations_with("creates"), "as_tensor", "asarray")}
    random = [f for f in originals.values() if traits_of_function(f).random]
    thread: int | None = threading.get_ident()

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            has_proxies = any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs)))
            if recorder.is_evaluating or not (has_proxies or original in random):
                return original(*args, **kwargs)
            if original in _CONVERSIONS:
                return _converted(recorder, original, *args, **kwargs)
            return recorder.create_proxy("call_function", original, args, kwargs)

        return factory

    try:
        for name, original in originals.items():
            setattr(torch, name, recording(original))
        yield
    finally:
        thread = None  # a step may have stored such a function
        for name, original in originals.items():
            setattr(torch, name, original)


_FUNCTIONS_OF_SIZES = "broadcast_to narrow repeat_interleave reshape tile unflatten".split()
"""Functions of a tensor and sizes."""
_METHODS_OF_SIZES = (*_FUNCTIONS_OF_SIZES, *"expand new_empty new_full new_ones new_zeros repeat view".split())
"""Methods of a tensor that take sizes."""


@contextlib.contextmanager
def patched_size_arguments(recorder: Recorder) -> Iterator[None]:
    """Record `torch.zeros(1, 4).repeat(x.shape[0], 1)`, which applies a recorded size to a constant tensor.

    torch's C++ code either refuses a proxy there, or asks it for the size of the example.
    """
    thread: int | None = threading.get_ident()

    def recording(kind: str, target: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if recorder.is_evaluating or threading.get_ident() != thread:
                return original(*args, **kwargs)
            if not any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs))):
                return original(*args, **kwargs)
            return recorder.create_proxy(kind, target, args, kwargs)

        return call

    undo: list[Callable[[], None]] = []
    try:
        for name in _METHODS_OF_SIZES:
            _replace(torch.Tensor, name, partial(recording, "call_method", name), undo)
        for name in _FUNCTIONS_OF_SIZES:
            original = getattr(torch, name)
            _replace(torch, name, partial(recording, "call_function", original), undo)
        yield
    finally:
        thread = None  # a step may have stored such a function
        for restore in undo:
            restore()


def _replace(owner: Any, name: str, changed: Callable[[Any], Any], undo: list[Callable[[], None]]) -> None:
    """Set an attribute to a function of its value, and append the inverse to `undo`."""
    original, is_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, changed(original))
    undo.append(partial(setattr, owner, name, original) if is_own else partial(delattr, owner, name))


@contextlib.contextmanager
def patched_script_functions(recorder: Recorder) -> Iterator[None]:
    """Trace the Python function that `torch.jit.script` or `torch.jit.trace` compiled, where it is called on proxies.

    Raises:
        CaptureError: SNNFX220, the function has no Python original because it was loaded from a file.
    """
    script_function: Any = torch.jit.ScriptFunction
    original: Any = script_function.__call__
    thread = threading.get_ident()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        is_recorded = threading.get_ident() == thread and not recorder.is_evaluating
        if not is_recorded or not any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs))):
            return original(function, *args, **kwargs)
        python = python_of_script(function)
        if python is None:
            refuse_scripted_code(f"`{function.name}`", format_location(user_location()))
        return python(*args, **kwargs)

    script_function.__call__ = call
    try:
        yield
    finally:
        script_function.__call__ = original


def autocast_state() -> tuple[bool, ...]:
    """Whether autocast is enabled, for each device type."""
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
