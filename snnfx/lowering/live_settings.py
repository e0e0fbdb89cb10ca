"""Settings of a region's modules, the cache key that every call checks.

A recording holds the Python values of a module's attributes (`neuron.tau`), which may change between calls. Collecting
all attributes of a module takes longer than a small kernel. A snapshot therefore keeps the settings together with the
objects that they were collected from, and stays valid as long as the module has the same objects.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.state.hooks import has_forward_hooks

__all__ = ["HOOKS", "NOT_HYPERPARAMETERS", "Settings", "SettingsOfRegion", "Snapshot", "modules_of"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REGISTRIES = ("_parameters", "_buffers", "_modules", *HOOKS)
NOT_HYPERPARAMETERS = frozenset((*nn.Module().__dict__, "_memories")) - {"training"}
"""Attributes of every `nn.Module`, and memories."""


class Settings:
    """The settings of a module and its submodules, as a key that compares fast with itself."""

    __slots__ = ("_hash", "value")

    def __init__(self, value: tuple[Any, ...]) -> None:
        self.value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Settings) and self.value == other.value)


class SettingsOfRegion:
    """The settings of the constants of one region, cached between calls."""

    def __init__(self) -> None:
        self._snapshots: dict[int, Snapshot] = {}

    def of(self, constants: Sequence[Any]) -> tuple[Any, ...] | None:
        """A key for the constants of a call; None if a module among them has hooks, which a kernel does not run."""
        found: list[Any] = []
        for index, constant in enumerate(constants):
            if isinstance(constant, nn.Module):
                snapshot = self._snapshots.get(index)
                if snapshot is None or snapshot.module is not constant or not snapshot.is_current():
                    snapshot = self._snapshots[index] = Snapshot(constant)
                if snapshot.has_hooks:
                    return None
                found.append(snapshot.settings)
            elif isinstance(constant, Tensor):
                found.append((constant.shape, constant.dtype, constant.requires_grad))
            else:
                found.append((type(constant), constant))
        return tuple(found)


class Snapshot:
    """The settings of a module, with the attribute values that they were collected from."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = list(modules_of(module))
        self.settings = Settings(tuple([_settings_of(m) for m in self.modules]))
        self.has_hooks = any(map(has_forward_hooks, self.modules))
        self._classes, self._attributes = list(map(type, self.modules)), list(map(vars, self.modules))
        # Views of dicts and the lists themselves show later changes.
        self._views: list[Collection[Any]] = []
        for attributes in self._attributes:
            self._views += [attributes.values(), *(attributes[name].values() for name in _REGISTRIES)]
            hyperparameters = (v for k, v in attributes.items() if k not in NOT_HYPERPARAMETERS)
            self._views += _views_inside(hyperparameters)
        self._lengths = list(map(len, self._views))
        self._objects = list(chain.from_iterable(self._views))
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        self._of_tensors = [(x.shape, x.dtype, x.requires_grad) for x in self._tensors]

    def is_current(self) -> bool:
        """Whether every attribute is still the same object, and every tensor has the same shape and dtype."""
        return (
            list(map(len, self._views)) == self._lengths
            and all(map(operator.is_, chain.from_iterable(self._views), self._objects))
            and all(map(operator.is_, map(type, self.modules), self._classes))
            and all(map(operator.is_, map(vars, self.modules), self._attributes))
            and [(x.shape, x.dtype, x.requires_grad) for x in self._tensors] == self._of_tensors
        )


def modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its submodules, shared ones repeated; `Module.modules` is slow."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from modules_of(child)


def _views_inside(values: Any) -> Iterator[Collection[Any]]:
    """Live views of the elements of all lists and dicts nested in some values."""
    for value in values:
        if isinstance(value, dict):
            yield value.keys()
            yield value.values()
            yield from _views_inside((*value.keys(), *value.values()))
        elif isinstance(value, tuple | list):
            yield value
            yield from _views_inside(value)


def _settings_of(module: nn.Module) -> tuple[Any, ...]:
    found: list[Any] = [type(module)]
    for name, value in module.__dict__.items():
        if name in NOT_HYPERPARAMETERS:
            continue
        kind = type(value)
        if kind is bool or kind is int or kind is float or kind is str or value is None:
            found.append(value if kind is not float or value == value else "nan")
            found.append(kind)
        else:
            found.append(_hashable(value))
    for registry in (module._parameters, module._buffers):
        for tensor in registry.values():
            found.append(None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad))
    return tuple(found)


def _hashable(value: Any) -> Any:
    """A value as a hashable key: plain values by value, other objects by identity (their owner keeps them alive)."""
    if isinstance(value, bool | int | float | str | bytes | None | torch.dtype | torch.device):
        return (type(value), value)
    if isinstance(value, tuple | list):
        return (type(value), *[_hashable(v) for v in value])
    if isinstance(value, dict):
        return (dict, *[(_hashable(k), _hashable(v)) for k, v in value.items()])
    if isinstance(value, Tensor):
        return (id(value), value.shape, value.dtype, value.requires_grad)
    if isinstance(value, types.MethodType):
        # Recomputation runs with copies of modules, whose methods are bound to the copies.
        owner = value.__self__
        return (id(value.__func__), type(owner) if isinstance(owner, nn.Module) else id(owner))
    return id(value)
