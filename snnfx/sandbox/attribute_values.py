"""Copies of the plain attributes of a model, by value, to return to their values at a given time."""

from __future__ import annotations

import enum
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.sandbox.contents_snapshot import attributes_of
from snnfx.sandbox.tensor_values import same_values

__all__ = ["AttributeValues"]

_ATOMS = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)


class _NoCopy(Exception):
    """A value refers to an object that is not copied."""


@dataclass(frozen=True)
class AttributeValues:
    """The plain attributes of a model at one time, as copies.

    Numbers, texts, tensors, arrays, and lists, tuples, dicts, deques and sets of them are copied. An attribute that
    refers to anything else, such as a module, a function or an object of another class, has no copy.

    Args:
        names: all attributes, `(module name, attribute)`.
        values: the copies.
        classes: the class of each module; a module of another class has replaced it.

    Example:
        >>> model = nn.Identity()
        >>> model.trace = [torch.zeros(1)]
        >>> start = AttributeValues.of(model)
        >>> _ = model.trace[0].add_(1)
        >>> start.changed_in(model)
        [('', 'trace')]
        >>> start.restore(model, "", "trace")
        >>> model.trace
        [tensor([0.])]
    """

    names: frozenset[tuple[str, str]]
    values: dict[tuple[str, str], Any]
    classes: dict[str, type[nn.Module]]

    @staticmethod
    def of(model: nn.Module) -> AttributeValues:
        """Copy the attributes of a model and of its submodules."""
        values = _attributes(model)
        copied = {}
        for key, value in values.items():
            try:
                copied[key] = _copy(value, lambda x: x.detach().clone())
            except (_NoCopy, RecursionError):  # a list may contain itself
                continue
        return AttributeValues(frozenset(values), copied, {name: type(m) for name, m in model.named_modules()})

    def mapped(self, function: Callable[[Tensor], Tensor]) -> AttributeValues:
        """The same attributes, with the results of a function in place of the tensors."""
        return replace(self, values={key: _copy(value, function) for key, value in self.values.items()})

    def changed_in(self, model: nn.Module) -> list[tuple[str, str]]:
        """The attributes that a model has in addition, lacks, or has with another value than the copy."""
        classes = {name: type(module) for name, module in model.named_modules()}
        kept = {name for name, cls in classes.items() if self.classes.get(name) is cls}
        current = {key: value for key, value in _attributes(model).items() if key[0] in kept}
        added = [key for key in current if key not in self.names]
        lacking = [key for key in self.values if key[0] in kept and key not in current]
        differing = [k for k, v in current.items() if k in self.values and not _is_equal(v, self.values[k])]
        return [*added, *lacking, *differing]

    def restore(self, model: nn.Module, name: str, attribute: str) -> None:
        """Set an attribute of a model to a copy of its value, on the device and in the precision of the current one."""
        attributes, key = model.get_submodule(name).__dict__, (name, attribute)
        if key in self.values:
            current = next(iter(_tensors(attributes.get(attribute))), None)
            attributes[attribute] = _copy(self.values[key], lambda x: _converted(x, current))
        elif key not in self.names:
            attributes.pop(attribute, None)


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in attributes_of(module).items()
    }


def _converted(x: Tensor, like: Tensor | None) -> Tensor:
    """A copy of a tensor; the model may have been converted to another dtype or device since."""
    if like is None:
        return x.clone()
    is_wider = like.is_floating_point() and x.is_floating_point()
    return x.to(like.device, like.dtype if is_wider else x.dtype, copy=True)


def _copy(value: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.is_nested or isinstance(value, nn.Parameter):
            raise _NoCopy
        return of_tensor(value)
    kind = type(value)
    if kind in (list, set, frozenset):
        return kind(_copy(element, of_tensor) for element in value)
    if isinstance(value, tuple) and kind is not torch.Size:
        elements = [_copy(element, of_tensor) for element in value]
        return kind(*elements) if hasattr(value, "_fields") else tuple(elements)
    if kind is deque:
        return deque((_copy(element, of_tensor) for element in value), value.maxlen)
    if isinstance(value, dict) and kind.__module__ in ("builtins", "collections"):
        copied = value.copy()
        copied.update({key: _copy(element, of_tensor) for key, element in value.items()})
        return copied
    if isinstance(value, _ATOMS):
        return value
    if _is_array(value):
        return value.copy()
    raise _NoCopy


def _is_equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and same_values(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    if _is_array(a):
        return a.shape == b.shape and bool(((a == b) | (a != a)).all())
    return bool(a == b) or bool(a != a and b != b)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for element in value.values() for x in _tensors(element)]
    if isinstance(value, list | tuple | deque):
        return [x for element in value for x in _tensors(element)]
    return []


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.generic)
