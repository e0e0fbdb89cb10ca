"""Snapshots of nested containers and plain objects, to detect changes and to restore them."""

from __future__ import annotations

import array
import enum
import functools
import io
import pickle
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "MISSING",
    "Change",
    "ClassContentsSnapshot",
    "ContentsSnapshot",
    "attributes_of",
    "slot_names",
]

MISSING = object()
"""In a `Change`: the element did not exist, or no longer exists."""

_MAX_DEPTH = 100
_SCALARS = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
_ATOMIC_TYPES = (
    *_SCALARS, Tensor, nn.Module, fx.Proxy, type, types.BuiltinFunctionType, types.ModuleType, torch.dtype,
    torch.device,
)  # fmt: skip
_OPEN_PACKAGES = ("__main__", "argparse", "collections", "functools", "queue", "types")
"""Packages of the standard library whose objects may hold state of a model."""
_CONTAINER_KINDS: dict[type, str] = {list: "list", tuple: "tuple", dict: "dict", deque: "deque", set: "set"}


_INTERNALS = frozenset(vars(nn.Module()))
"""Module attributes that torch manages."""


@dataclass(frozen=True)
class Change:
    """One difference between a snapshot and the current contents.

    Args:
        path: location of the difference: the attribute, then keys, indices and names.
        old, new: the values at that location.
        kind: type of the innermost container: "" for the attribute itself, else "list", "dict", "object", ...
    """

    path: tuple[Any, ...]
    old: Any
    new: Any
    kind: str


class ContentsSnapshot:
    """The contents of named values at the time of construction.

    Args:
        values: the named values. Tensors, modules and classes are compared by identity.
        functions: whether to include the attributes of functions.
    """

    def __init__(self, values: Mapping[str, Any], functions: bool = False) -> None:
        self.values, self._with_functions = dict(values), functions
        self.tensors: list[Tensor] = []
        self._contents: dict[int, tuple[Any, str, Any]] = {}
        self._record(self.values.values())

    def _record(self, values: Iterable[Any]) -> None:
        """Record values and everything in them, with a stack of its own: a web of objects may be deep."""
        stack = [(value, 0) for value in reversed([*values])]
        while stack:
            value, depth = stack.pop()
            if isinstance(value, Tensor):
                self.tensors.append(value)
            kind = _kind_of(value)
            if kind == "function" and not self._with_functions:
                continue
            if not kind or id(value) in self._contents or depth == _MAX_DEPTH:
                continue
            contents = _shallow_copy(value, kind)
            self._contents[id(value)] = value, kind, contents
            stack += [(element, depth + 1) for element in reversed([*_elements(contents, kind).values()])]

    def restore(self) -> None:
        """Restore the contents of containers and objects; the caller restores the named values themselves."""
        for value, kind, contents in self._contents.values():
            if not _are_same_contents(_shallow_copy(value, kind), contents, kind):
                _restore_contents(value, kind, contents)

    def copy_of_original(self, value: Any) -> Any:
        """A copy of a container with its contents at the time of the snapshot."""
        if id(value) not in self._contents:
            return value
        _, kind, contents = self._contents[id(value)]
        if kind not in ("list", "tuple", "dict", "deque"):
            return value
        elements = {key: self.copy_of_original(element) for key, element in _elements(contents, kind).items()}
        if kind == "dict":
            return elements
        if kind == "deque":
            return deque(elements.values(), value.maxlen)
        if kind == "tuple":
            return type(value)(*elements.values()) if hasattr(value, "_fields") else tuple(elements.values())
        return list(elements.values())

    def changes(self, name: str, new: Any) -> Iterator[Change]:
        """Differences between the recorded and a new value; a new container with equal contents is not one."""
        seen: set[tuple[int, int]] = set()
        stack: list[tuple[tuple[Any, ...], Any, Any, str]] = [((name,), self.values.get(name, MISSING), new, "")]
        while stack:
            path, old, now, container_kind = stack.pop()
            kind = _kind_of(old)
            if id(old) not in self._contents or type(old) is not type(now):
                if not _is_equal(old, now):
                    yield Change(path, old, now, container_kind)
                continue
            if (id(old), id(now)) in seen:
                continue
            seen.add((id(old), id(now)))
            contents, current = self._contents[id(old)][2], _shallow_copy(now, kind)
            if kind in ("set", "array", "random"):
                if not _are_same_contents(current, contents, kind):
                    yield Change(path, old, now, kind)
                continue
            before, after = _elements(contents, kind), _elements(current, kind)
            keys = [*before, *(key for key in after if key not in before)]
            stack += [((*path, key), before.get(key, MISSING), after.get(key, MISSING), kind) for key in reversed(keys)]


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module."""
    return {key: value for key, value in module.__dict__.items() if key not in _INTERNALS}


class ClassContentsSnapshot:
    """Snapshot of the plain attributes of the classes of a model's modules, which all instances share."""

    def __init__(self, model: nn.Module) -> None:
        classes = {cls: None for m in model.modules() for cls in type(m).__mro__}
        users = [cls for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins", "snnfx")]
        self._values = {
            f"{cls.__name__}.{name}": (cls, name)
            for cls in users
            for name, value in vars(cls).items()
            if name[:2] != "__" and isinstance(value, (*_SCALARS, *_CONTAINER_KINDS))
        }
        self._snapshot = ContentsSnapshot({key: vars(cls)[name] for key, (cls, name) in self._values.items()})

    def changes(self) -> Iterator[Change]:
        """Differences between the recorded and the current attributes."""
        for key, (cls, name) in self._values.items():
            yield from self._snapshot.changes(key, vars(cls).get(name, MISSING))

    def restore(self) -> None:
        """Restore the recorded attributes."""
        for key, (cls, name) in self._values.items():
            if vars(cls).get(name, MISSING) is not self._snapshot.values[key]:
                setattr(cls, name, self._snapshot.values[key])
        self._snapshot.restore()


def _kind_of(value: Any) -> str:
    """The kind of container that a value is; "" for a value without recorded contents."""
    if isinstance(value, _ATOMIC_TYPES):
        return ""
    for cls, kind in _CONTAINER_KINDS.items():
        if isinstance(value, cls):
            return kind
    if isinstance(value, random.Random | torch.Generator):
        return "random"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return "array"
    if numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState):
        return "random"
    if isinstance(value, bytearray | array.array):
        return "array"
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return "function"
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    # Loggers, locks and files are not model state, and they reference unrelated objects.
    if (
        isinstance(value, io.IOBase)
        or package in ("torch", "snnfx")
        or (package in sys.stdlib_module_names and package not in _OPEN_PACKAGES)
    ):
        return ""
    return "object" if hasattr(value, "__dict__") or slot_names(cls) else ""


def slot_names(cls: type) -> list[str]:
    """The names in `__slots__` of a class and its bases."""
    names = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    return [name for slots in names for name in ((slots,) if isinstance(slots, str) else slots) if name[:2] != "__"]


def _shallow_copy(value: Any, kind: str) -> Any:
    if kind in ("list", "tuple", "deque"):
        return list(value)
    if kind == "dict":
        return dict(value)
    if kind == "set":
        return set(value)
    if kind == "array":
        return bytes(value) if isinstance(value, bytearray | array.array) else value.copy()
    if kind == "function":
        return _contents_of_function(value)
    if kind == "random":
        return _generator_state(value)
    slots = {name: getattr(value, name) for name in slot_names(type(value)) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _contents_of_function(value: Any) -> dict[str, Any]:
    """The contents of a function, a bound method or a partial function: attributes, object, arguments.

    Closure variables are not among them: `snnfx.capture.variable_changes` compares them, with the globals.
    """
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return {"__self__": value.__self__, "__func__": value.__func__}
    return dict(value.__dict__)


def _elements(contents: Any, kind: str) -> dict[Any, Any]:
    if kind in ("list", "tuple", "deque"):
        return dict(enumerate(contents))
    return contents if kind in ("dict", "object", "function") else {}


def _are_same_contents(now: Any, before: Any, kind: str) -> bool:
    if kind in ("list", "tuple", "deque", "dict", "object", "function"):
        a, b = _elements(now, kind), _elements(before, kind)
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    if kind == "array" and isinstance(now, bytes):
        return bool(now == before)
    if kind == "array":
        return bool(now.shape == before.shape and now.tobytes() == before.tobytes())
    return bool(now == before)


def _restore_contents(value: Any, kind: str, contents: Any) -> None:
    if isinstance(value, bytearray):
        value[:] = contents
    elif isinstance(value, array.array):
        del value[:]
        value.frombytes(contents)
    elif kind == "array":
        value[...] = contents
    elif kind == "function":
        _restore_function(value, contents)
    elif kind == "random":
        _set_generator_state(value, contents)
    elif kind == "object":
        attributes = getattr(value, "__dict__", {})
        for name in _shallow_copy(value, kind).keys() - contents.keys():
            attributes.pop(name, None)
        for name, element in contents.items():
            # Not by setattr, which would run the setter of a property.
            if name in slot_names(type(value)):
                object.__setattr__(value, name, element)
            else:
                attributes[name] = element
    elif kind != "tuple":
        value.clear()
        (value.update if kind in ("dict", "set") else value.extend)(contents)


def _restore_function(value: Any, contents: dict[str, Any]) -> None:
    if not isinstance(value, types.FunctionType):
        return  # a bound method and a partial function never change; the objects in them are restored themselves
    value.__dict__.clear()
    value.__dict__.update(contents)


def _generator_state(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist())
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    bits = getattr(generator, "bit_generator", None)  # a NumPy Generator has it, a RandomState does not
    return pickle.dumps(generator.get_state() if bits is None else bits.state)


def _set_generator_state(generator: Any, state: bytes) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.tensor(list(state), dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        generator.setstate(pickle.loads(state))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = pickle.loads(state)
    else:
        generator.set_state(pickle.loads(state))


def _is_equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, (*_SCALARS, set, torch.dtype, torch.device, types.MethodType)):
        return False
    return bool(a == b) or (a != a and b != b)
