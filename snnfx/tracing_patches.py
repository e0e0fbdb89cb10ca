"""What has to be replaced in Python and torch while a step is recorded, each for the time of the trace only."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from snnfx.proxy import StepProxy
from snnfx.step_functions import FunctionHolder, apply_autograd_function

if TYPE_CHECKING:
    from snnfx.tracer import StepTracer

__all__ = ["autocast_state", "patched_apply", "patched_factories", "patched_isinstance"]

_FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "arange", "eye", "linspace", "randint", "randperm")
_RANDOM_FACTORIES = ("rand", "randn", "randint", "randperm")


@contextlib.contextmanager
def patched_apply(tracer: StepTracer) -> Iterator[None]:
    """While tracing, `SomeFunction.apply(proxy)` records one node instead of running the forward on proxies."""
    base = torch.autograd.Function
    original = base.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if tracer.is_evaluating or not any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs))):
            return original.__get__(None, cls)(*args, **kwargs)
        holder = next(
            (h for h in tracer.constants.values() if isinstance(h, FunctionHolder) and h.function is cls), None
        )
        holder_proxy = tracer.proxy(tracer.constant(holder or FunctionHolder(cls)))
        return tracer.create_proxy("call_function", apply_autograd_function, (holder_proxy, *args), kwargs)

    base.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        base.apply = original  # type: ignore[method-assign]


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


@contextlib.contextmanager
def patched_factories(tracer: StepTracer) -> Iterator[None]:
    """While tracing, `torch.zeros(x.shape[0], 4)` records one node: C++ does not take a proxy for a size.

    `torch.rand(5)` does so whatever its size: drawn for real, the numbers would be the same in every call of the net.
    """
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            proxies = any(type(a) is StepProxy for a in pytree.tree_leaves((args, kwargs)))
            if tracer.is_evaluating or not (proxies or original.__name__ in _RANDOM_FACTORIES):
                return original(*args, **kwargs)
            return tracer.create_proxy("call_function", original, args, kwargs)

        return factory

    try:
        for name, original in originals.items():
            setattr(torch, name, recording(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def autocast_state() -> tuple[bool, ...]:
    """Whether autocast is on, for each kind of device."""
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
