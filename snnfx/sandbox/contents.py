"""What some values hold at one time, through containers and plain objects: to notice changes, and to put them back."""

from __future__ import annotations

import enum
import pickle
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
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
    "python_rng_state",
    "restore_python_rng_state",
]

MISSING = object()
"""In a `Change`: there was, or is, no such element."""

_MOST_LEVELS = 6
_SCALARS = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
_WITHOUT_CONTENTS = (
    *_SCALARS, Tensor, nn.Module, fx.Proxy, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.ModuleType, torch.dtype, torch.device,
)  # fmt: skip
_KINDS: dict[type, str] = {list: "list", tuple: "tuple", dict: "dict", deque: "deque", set: "set"}


_INTERNALS = frozenset(vars(nn.Module())) | {"_memories", "_initial_memories", "_memories_rv"}
"""Attributes of modules that are torch's business, or that hold registered states."""


@dataclass(frozen=True)
class Change:
    """One difference between what was held and what is.

    Args:
        path: where it is: the attribute, then keys, indices and names.
        old, new: the values there.
        kind: of the innermost thing that holds it: "" for the attribute itself, else "list", "dict", "object", ...
    """

    path: tuple[Any, ...]
    old: Any
    new: Any
    kind: str


class ContentsSnapshot:
    """The contents of named values, as they are when this is made.

    Args:
        values: what is looked into. Tensors, modules, functions and classes are taken as they are.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.tensors: list[Tensor] = []
        self._contents: dict[int, tuple[Any, str, Any]] = {}
        for value in self.values.values():
            self._look_into(value, 0)

    def _look_into(self, value: Any, level: int) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        kind = _kind_of(value)
        if not kind or id(value) in self._contents or level == _MOST_LEVELS:
            return
        contents = _contents_of(value, kind)
        self._contents[id(value)] = value, kind, contents
        for element in _elements(contents, kind).values():
            self._look_into(element, level + 1)

    def restore(self) -> None:
        """Put back what the containers and objects held; the named values are the caller's."""
        for value, kind, contents in self._contents.values():
            if not _is_same_content(_contents_of(value, kind), contents, kind):
                _put_back(value, kind, contents)

    def before(self, value: Any) -> Any:
        """A container as it was, as new lists, tuples, dicts and deques."""
        if id(value) not in self._contents:
            return value
        _, kind, contents = self._contents[id(value)]
        elements = {key: self.before(element) for key, element in _elements(contents, kind).items()}
        if kind == "dict":
            return elements
        if kind == "deque":
            return deque(elements.values(), value.maxlen)
        if kind == "tuple":
            return type(value)(*elements.values()) if hasattr(value, "_fields") else tuple(elements.values())
        return list(elements.values()) if kind == "list" else value

    def changes(self, name: str, new: Any) -> Iterator[Change]:
        """How the value of a name differs from what it was; a new container with equal contents does not."""
        return self._compare((name,), self.values.get(name, MISSING), new, "", set())

    def _compare(
        self, path: tuple[Any, ...], old: Any, new: Any, inside: str, seen: set[tuple[int, int]]
    ) -> Iterator[Change]:
        kind = _kind_of(old)
        if id(old) not in self._contents or type(old) is not type(new):
            if not _is_equal(old, new):
                yield Change(path, old, new, inside)
            return
        if (id(old), id(new)) in seen:
            return
        seen.add((id(old), id(new)))
        contents, now = self._contents[id(old)][2], _contents_of(new, kind)
        if kind in ("set", "array", "random"):
            if not _is_same_content(now, contents, kind):
                yield Change(path, old, new, kind)
            return
        elements, others = _elements(contents, kind), _elements(now, kind)
        for key in (*elements, *(key for key in others if key not in elements)):
            yield from self._compare((*path, key), elements.get(key, MISSING), others.get(key, MISSING), kind, seen)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module."""
    return {key: value for key, value in module.__dict__.items() if key not in _INTERNALS}


class ClassContentsSnapshot:
    """What the classes of a model's modules hold in plain attributes, which all their instances share."""

    def __init__(self, model: nn.Module) -> None:
        classes = {cls: None for m in model.modules() for cls in type(m).__mro__}
        users = [cls for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins", "snnfx")]
        self._values = {
            f"{cls.__name__}.{name}": (cls, name)
            for cls in users
            for name, value in vars(cls).items()
            if name[:2] != "__" and isinstance(value, (*_SCALARS, *_KINDS))
        }
        self._held = ContentsSnapshot({key: vars(cls)[name] for key, (cls, name) in self._values.items()})

    def changes(self) -> Iterator[Change]:
        """How they differ from what they were."""
        for key, (cls, name) in self._values.items():
            yield from self._held.changes(key, vars(cls).get(name, MISSING))

    def restore(self) -> None:
        """Put them back."""
        for key, (cls, name) in self._values.items():
            if vars(cls).get(name, MISSING) is not self._held.values[key]:
                setattr(cls, name, self._held.values[key])
        self._held.restore()


def _kind_of(value: Any) -> str:
    """How a value holds others; "" for what is taken as it is."""
    if isinstance(value, _WITHOUT_CONTENTS):
        return ""
    for cls, kind in _KINDS.items():
        if isinstance(value, cls):
            return kind
    if isinstance(value, random.Random | torch.Generator):
        return "random"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return "array"
    if numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState):
        return "random"
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    # Loggers, locks and files are no state of a model, and lead to all kinds of places.
    foreign = package == "torch" or (package in sys.stdlib_module_names and package != "__main__")
    if cls is not types.SimpleNamespace and foreign:
        return ""
    return "object" if hasattr(value, "__dict__") or _slots_of(cls) else ""


def _slots_of(cls: type) -> list[str]:
    names = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    return [name for slots in names for name in ((slots,) if isinstance(slots, str) else slots) if name[:2] != "__"]


def _contents_of(value: Any, kind: str) -> Any:
    if kind in ("list", "tuple", "deque"):
        return list(value)
    if kind == "dict":
        return dict(value)
    if kind == "set":
        return set(value)
    if kind == "array":
        return value.copy()
    if kind == "random":
        return _state_of(value)
    slots = {name: getattr(value, name) for name in _slots_of(type(value)) if hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _elements(contents: Any, kind: str) -> dict[Any, Any]:
    if kind in ("list", "tuple", "deque"):
        return dict(enumerate(contents))
    return contents if kind in ("dict", "object") else {}


def _is_same_content(now: Any, before: Any, kind: str) -> bool:
    if kind in ("list", "tuple", "deque", "dict", "object"):
        a, b = _elements(now, kind), _elements(before, kind)
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    if kind == "array":
        return bool(now.shape == before.shape and now.tobytes() == before.tobytes())
    return bool(now == before)


def _put_back(value: Any, kind: str, contents: Any) -> None:
    if kind == "array":
        value[...] = contents
    elif kind == "random":
        _set_state(value, contents)
    elif kind == "object":
        inside = getattr(value, "__dict__", {})
        for name in _contents_of(value, kind).keys() - contents.keys():
            inside.pop(name, None)
        for name, element in contents.items():
            # Not by setattr: a property would have its own opinion.
            if name in _slots_of(type(value)):
                object.__setattr__(value, name, element)
            else:
                inside[name] = element
    elif kind != "tuple":
        value.clear()
        (value.update if kind in ("dict", "set") else value.extend)(contents)


def _state_of(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist())
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    bits = getattr(generator, "bit_generator", None)  # of a Generator of NumPy; else a RandomState
    return pickle.dumps(generator.get_state() if bits is None else bits.state)


def _set_state(generator: Any, state: bytes) -> None:
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


def python_rng_state() -> tuple[Any, bytes | None]:
    """The states of the generators of Python and, where it is loaded, NumPy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else pickle.dumps(numpy.random.get_state())


def restore_python_rng_state(state: tuple[Any, bytes | None]) -> None:
    """Go on drawing from here."""
    random.setstate(state[0])
    numpy = sys.modules.get("numpy")
    if state[1] is not None and numpy is not None:
        numpy.random.set_state(pickle.loads(state[1]))
