"""Registry of stateful modules: which adapter steps a module of each class."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

from torch import Tensor, nn

from snnfx.state.stateful import Adapter

__all__ = ["adapter_of", "detach_net", "named_stateful", "register_adapter", "reset_net"]

_adapters: dict[type, Adapter] = {}
_adapter_of_class: dict[type, Adapter | None] = {}
_THIRD_PARTY = ("spikingjelly", "snntorch", "norse")
"""Packages with an adapter module of the same name in `snnfx.state.adapters`, imported when a module of theirs is
met."""


def register_adapter(cls: type, adapter: Adapter) -> None:
    """Teach snnfx how to step `cls` and its subclasses."""
    _adapters[cls] = adapter
    _adapter_of_class.clear()


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the nearest registered base class of a module, or None for a module without known state."""
    module_class = type(module)
    if module_class not in _adapter_of_class:
        _adapter_of_class[module_class] = _find_adapter(module_class)
    return _adapter_of_class[module_class]


def _find_adapter(module_class: type) -> Adapter | None:
    for cls in module_class.__mro__:
        package = cls.__module__.partition(".")[0]
        if package in _THIRD_PARTY and f"snnfx.state.adapters.{package}" not in sys.modules:
            importlib.import_module(f"snnfx.state.adapters.{package}")
        if cls in _adapters:
            return _adapters[cls]
    return None


def named_stateful(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """`(qualified name, module, adapter)` of each stateful module of a model, each module once."""
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.names(module):
            yield name, module, adapter


def reset_net(model: nn.Module) -> None:
    """Give every state of a model, or the state carried by a converted net, its initial value.

    Args:
        model: any module; stateful modules of registered kinds are found among its submodules.
    """
    carried = getattr(model, "reset_carried_state", None)
    if callable(carried):
        carried()
    for _, module, adapter in named_stateful(model):
        adapter.reset(module)


def detach_net(model: nn.Module) -> None:
    """Cut the history of every state of a model, or of the state carried by a converted net (truncated BPTT)."""
    carried = getattr(model, "detach_carried_state", None)
    if callable(carried):
        carried()
    for _, module, adapter in named_stateful(model):
        adapter.write(module, [v.detach() if isinstance(v, Tensor) else v for v in adapter.read(module)])
