"""Registry of stateful modules: which adapter steps a module of each class."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from torch import Tensor, nn

from snnfx.errors import warn_once
from snnfx.state.stateful import Adapter

__all__ = [
    "adapter_of",
    "current_storage_of",
    "detach_net",
    "named_stateful",
    "register_adapter",
    "registered_attributes",
    "reset_net",
    "storage_of",
]

_adapters: dict[type, Adapter] = {}
_adapter_of_class: dict[type, Adapter | None] = {}
"""A dict as cache, because torch.compile warns about functools.cache."""
_imported: set[str] = set()
"""The packages whose adapters have been looked for."""
_LIBRARIES_WITH_ADAPTERS = ("spikingjelly", "snntorch", "norse")
"""Packages with an adapter module of the same name in `snnfx.state.adapters`, imported for the first module of the
package."""


def register_adapter(cls: type, adapter: Adapter) -> None:
    """Register the adapter that steps `cls` and its subclasses."""
    _adapters[cls] = adapter
    _adapter_of_class.clear()


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the nearest registered base class of a module, or None if no class is registered."""
    module_class = module.__class__
    if module_class not in _adapter_of_class:
        _adapter_of_class[module_class] = _find_adapter(module_class)
    return _adapter_of_class[module_class]


def _find_adapter(module_class: type) -> Adapter | None:
    for cls in module_class.__mro__:
        package = cls.__module__.partition(".")[0]
        if package in _LIBRARIES_WITH_ADAPTERS and package not in _imported:
            _imported.add(package)
            _import_adapters(package)
        if cls in _adapters:
            return _adapters[cls]
    return None


def _import_adapters(package: str) -> None:
    """Import the adapters of a library; a version with another layout has none, and capture traces its code."""
    try:
        importlib.import_module(f"snnfx.state.adapters.{package}")
    except ImportError as error:
        missing = error.name or ""
        if missing.partition(".")[0] != package:
            raise
        warn_once(
            "SNNFX223",
            f"this version of {package} has another layout ({error}), so snnfx has no adapter for its modules and "
            "traces them like code of your own.",
        )


def named_stateful(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Yield `(qualified name, module, adapter)` of each stateful module of a model, once per module."""
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.names(module):
            yield name, module, adapter


def storage_of(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """The attributes in which registered classes store the states that their adapters read and write.

    An adapter names them in `storage` if they are other attributes than the states themselves.
    """
    return {(m, name) for m in model.modules() for name in getattr(adapter_of(m), "storage", ())}


def current_storage_of(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """The attributes in which registered classes store current states: the first of each `storage`.

    The others hold reset values.
    """
    return {(m, name) for m in model.modules() for name in getattr(adapter_of(m), "storage", ())[:1]}


def registered_attributes(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """The states of registered classes, and the attributes in which they store them."""
    states = {(m, name) for _, m, adapter in named_stateful(model) for name in adapter.names(m)}
    return storage_of(model) | states


def reset_net(model: nn.Module) -> None:
    """Reset every state of a model, or the state that a converted net carries, to its initial value.

    Args:
        model: any module; its stateful submodules of registered classes are reset.
    """
    carried = getattr(model, "reset_carried_state", None)
    if callable(carried):
        carried()
    for _, module, adapter in named_stateful(model):
        adapter.reset(module)


def detach_net(model: nn.Module) -> None:
    """Detach every state of a model, or of a converted net, from the autograd graph (truncated BPTT)."""
    carried = getattr(model, "detach_carried_state", None)
    if callable(carried):
        carried()
    for _, module, adapter in named_stateful(model):
        adapter.write(module, [v.detach() if isinstance(v, Tensor) else v for v in adapter.read(module)])
