"""Observe everything that a model stores: parameters, buffers, and attributes with the contents of containers."""

from __future__ import annotations

import io
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.sandbox.contents_snapshot import attributes_of, slot_names

__all__ = ["Observed", "changed_names", "is_same", "observe"]

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MOST_LEVELS = 50


@dataclass(frozen=True)
class Observed:
    """One value that a model stores.

    Args:
        kind: "parameter", "buffer" or "attribute".
        value: a copy of the value.
        stored: the stored object itself.
        owner: the module that stores the value.
        attribute: the name of its attribute there; the value may lie in a container in it.
    """

    kind: str
    value: Any
    stored: Any
    owner: nn.Module
    attribute: str


def observe(model: nn.Module) -> dict[str, Observed]:
    """All values that a model stores, by qualified name.

    Elements of containers and attributes of objects have their key, index or name as the last part, e.g.
    "encoder.rates.0". Modules in plain containers are observed too. Functions and foreign objects are left out.

    Example:
        >>> model = torch.nn.ParameterList([torch.zeros(1)])
        >>> model.log = {"steps": [3]}
        >>> {name: entry.kind for name, entry in observe(model).items() if name != "_size"}
        {'0': 'parameter', 'log.steps.0': 'attribute', 'log.steps.#': 'attribute', 'log.#': 'attribute'}
    """
    observed: dict[str, Observed] = {}
    seen: dict[int, Any] = {}
    for name, module in model.named_modules():
        _observe_module(module, name, observed, seen, 0)
    return observed


def changed_names(before: Mapping[str, Observed], after: Mapping[str, Observed]) -> list[str]:
    """The names whose values differ, or that only one of two observations of a model contains."""
    names = dict.fromkeys((*before, *after))
    return [n for n in names if n not in before or n not in after or not is_same(before[n].value, after[n].value)]


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal, without a tolerance; NaN equals NaN."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        if value.shape != other.shape or value.dtype != other.dtype or value.layout != other.layout:
            return False
        if value.is_meta or value.layout != torch.strided:
            return value.is_meta or torch.equal(value.to_dense(), other.to_dense())
        return torch.equal(value, other) or bool(((value == other) | (value.isnan() & other.isnan())).all())
    if type(value) is not type(other):
        return False
    return value is other or bool(value == other) or bool(value != value and other != other)


def _observe_module(
    module: nn.Module, name: str, observed: dict[str, Observed], seen: dict[int, Any], level: int
) -> None:
    if id(module) in seen or level > _MOST_LEVELS:
        return
    seen[id(module)] = module
    prefix = f"{name}." if name else ""
    for kind, registry in (("parameter", module._parameters), ("buffer", module._buffers)):
        for key, tensor in registry.items():
            if tensor is not None:
                observed[prefix + key] = Observed(kind, _copy(tensor), tensor, module, key)
    for key, value in attributes_of(module).items():
        for path, atom in _atoms(value, prefix + key, seen, level):
            if isinstance(atom, nn.Module):
                _observe_module(atom, path, observed, seen, level + 1)
            else:
                observed[path] = Observed("attribute", _copy(atom), atom, module, key)


def _atoms(value: Any, path: str, seen: dict[int, Any], level: int) -> Iterator[tuple[str, Any]]:
    """The values in a value by their paths; the length of a container has the name "#"."""
    if isinstance(value, (*_ATOMS, Tensor, nn.Module)) or _is_array(value):
        yield path, value
        return
    if isinstance(value, random.Random):
        yield path, value.getstate()
        return
    if isinstance(value, torch.Generator):
        yield path, value.get_state()
        return
    elements = _elements(value)
    if elements is None or id(value) in seen or level > _MOST_LEVELS:
        return
    # `seen` keeps the value alive: a temporary one, made by a property or for a set, would leave its id to another.
    seen[id(value)] = value
    for key, element in elements.items():
        yield from _atoms(element, f"{path}.{key}", seen, level + 1)
    if isinstance(value, list | dict | deque):
        yield f"{path}.#", len(value)


def _elements(value: Any) -> dict[Any, Any] | None:
    """The elements of a container or the attributes of a plain object; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    if isinstance(value, set | frozenset):
        # The address of an object is not part of its contents.
        elements = (repr(e) if isinstance(e, (*_ATOMS, tuple)) else type(e).__name__ for e in value)
        return {"elements": tuple(sorted(elements))}
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    # Locks, loggers and files are not contents of a model, and they reference unrelated objects.
    is_foreign = package in ("torch", "snnfx") or (package in sys.stdlib_module_names and package != "__main__")
    is_namespace = cls.__name__ in ("SimpleNamespace", "Namespace")
    if callable(value) or isinstance(value, type | io.IOBase) or (is_foreign and not is_namespace):
        return None
    slots = {name: getattr(value, name) for name in slot_names(cls) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.generic)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if _is_array(value):
        is_numeric = value.dtype.kind in "biufc"
        return torch.as_tensor(value).clone() if is_numeric else value.tobytes()
    return value
