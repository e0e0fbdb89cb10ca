"""Guards: the Python values outside the graph that a captured step depends on.

A graph contains the Python values that the model's code read during capture. Each of these reads is a guard: a location
(an attribute of a module, a global of a Python module, a closure cell, and attributes and items from there) with the
expected value or object. Guards are data; `snnfx.runtime.guard_check` checks them at every call.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import operator
import reprlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import chain
from types import BuiltinFunctionType, CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.sandbox.tensor_values import same_values

__all__ = [
    "ABSENT",
    "MODES",
    "CellRoot",
    "FunctionRoot",
    "Guard",
    "GuardSources",
    "Guards",
    "ModuleRoot",
    "ModuleTree",
    "NamespaceRoot",
    "contents_of",
    "is_same_array",
    "is_same_tensor",
    "is_same_value",
    "text_of",
    "version_of",
]


class _Sentinel(enum.Enum):
    """Markers that stay the same objects in copies and pickles."""

    ABSENT = "absent"
    OF_COPY = "the object at this location in the copy"
    STALE = "changed before the copy"


ABSENT = _Sentinel.ABSENT
"""The value of a location that does not exist."""

MODES: dict[str, Callable[[], Any]] = {
    "torch.is_grad_enabled": torch.is_grad_enabled,
    "torch.is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "torch.is_autocast_enabled": torch.is_autocast_enabled,
    "torch.get_default_dtype": torch.get_default_dtype,
}
"""Functions that read a mode of torch. A net has one plan for each value that it is called with."""


@dataclass(frozen=True)
class ModuleRoot:
    """A module of the model, by its qualified name."""

    path: str


class _SharedRoot:
    """A root outside the model. Copies of a net share it; a pickle stores its name."""

    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedRoot:
        return self


class NamespaceRoot(_SharedRoot):
    """The global variables of a Python module."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace
        self.name = str(namespace.get("__name__", ""))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamespaceRoot) and self.namespace is other.namespace

    def __hash__(self) -> int:
        return id(self.namespace)

    def __reduce__(self) -> tuple[Any, ...]:
        return _namespace_of, (self.name,)


class CellRoot(_SharedRoot):
    """A variable in the closure of a function."""

    def __init__(self, function: FunctionType, index: int) -> None:
        self.function, self.index = function, index
        self.cell: CellType = (function.__closure__ or ())[index]
        self.name = f"{function.__name__}.{function.__code__.co_freevars[index]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CellRoot) and self.cell is other.cell

    def __hash__(self) -> int:
        return id(self.cell)

    def __reduce__(self) -> tuple[Any, ...]:
        return _cell_of, (self.function.__module__, self.function.__qualname__, self.index)


class FunctionRoot(_SharedRoot):
    """A function, whose default arguments are values."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.name = function.__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionRoot) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return _function_root, (self.function.__module__, self.function.__qualname__)


class _LostRoot(_SharedRoot):
    """A root that a new process does not have; its guards fail."""

    name = ""


def _namespace_of(name: str) -> _SharedRoot:
    with contextlib.suppress(ImportError):
        if name not in sys.modules:
            importlib.import_module(name)
    module = sys.modules.get(name)
    return _LostRoot() if module is None else NamespaceRoot(vars(module))


def _cell_of(module: str, qualified_name: str, index: int) -> _SharedRoot:
    function = _function_of(module, qualified_name)
    return CellRoot(function, index) if index < len(getattr(function, "__closure__", None) or ()) else _LostRoot()


def _function_root(module: str, qualified_name: str) -> _SharedRoot:
    function = _function_of(module, qualified_name)
    return FunctionRoot(function) if isinstance(function, FunctionType) else _LostRoot()


def _function_of(module: str, qualified_name: str) -> Any:
    root = _namespace_of(module)
    if not isinstance(root, NamespaceRoot):
        return None
    first, *rest = qualified_name.split(".")
    found: Any = root.namespace.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return getattr(found, "__func__", found)


Step = tuple[str, Any]
"""A step of a path: ("instance" | "class" | "attribute" | "item" | "key" | "cell", name, index or key), or
("condition", a `Condition` of the module)."""


@dataclass(frozen=True, eq=False)
class Guard:
    """The expected result of one test of a value.

    Args:
        root: the object that the path starts from.
        path: the steps to the value.
        test: "value" (equal plain value of the same type), "same" (the same object), "type", "length", "keys",
            "contents" (a container of plain values), "tensor" (the values of a tensor), "version" (of a tensor),
            "array" (a NumPy array), "some" (not None).
        expected: the value, object, length, ... at capture.
        shown: the value at capture in printed form.
    """

    root: ModuleRoot | _SharedRoot
    path: tuple[Step, ...]
    test: str
    expected: Any
    shown: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        """A guard of a copy: keys of dicts that the model refers to are those of its copy, other values are shared."""

        def copied(key: Any) -> Any:
            return memo.get(id(key), key)

        path = tuple((kind, copied(key) if kind == "key" else key) for kind, key in self.path)
        expected = self.expected
        if self.test == "keys":
            expected = (expected[0], [*map(copied, expected[1])])
        return replace(self, path=path, expected=expected)

    @property
    def name(self) -> str:
        """The location as in code, e.g. `lif1.cfg.k`."""
        text = self.root.path if isinstance(self.root, ModuleRoot) else self.root.name
        if isinstance(self.root, NamespaceRoot) and self.path:
            text, steps = f"{text}.{self.path[0][1]}" if text != "__main__" else str(self.path[0][1]), self.path[1:]
        else:
            steps = self.path
        for kind, key in steps:
            if kind in ("item", "key"):
                text += f"[{key!r}]"
            elif kind == "condition":
                text = str(key.shown)
            elif kind != "cell" and key not in ("_parameters", "_buffers"):
                text += f".{key}" if text else str(key)
        return text

    @property
    def is_number(self) -> bool:
        """Whether the guard covers a number, which a buffer could store."""
        is_number = isinstance(self.expected, int | float | complex)
        kind, name = self.path[-1]
        return self.test == "value" and is_number and kind != "condition" and name != "training"

    def resolve(self, model: nn.Module) -> Any:
        """The current value at the location; `ABSENT` if the location does not exist."""
        if isinstance(self.root, _LostRoot):
            return _Sentinel.STALE
        value: Any
        if isinstance(self.root, ModuleRoot):
            try:
                value = model.get_submodule(self.root.path)
            except AttributeError:
                return ABSENT
        elif isinstance(self.root, NamespaceRoot):
            value = self.root.namespace
        elif isinstance(self.root, FunctionRoot):
            value = self.root.function
        else:
            assert isinstance(self.root, CellRoot)
            value = self.root.cell
        for kind, key in self.path:
            if value is ABSENT:
                return ABSENT
            value = _step(value, kind, key)
        return value

    def holds(self, model: nn.Module) -> bool:
        """Whether the value at the location passes the test."""
        return passes(self.test, self.resolve(model), self.expected)


def _step(value: Any, kind: str, key: Any) -> Any:
    if kind == "instance":
        return vars(value).get(key, ABSENT)
    if kind == "class":
        return getattr(type(value), key, ABSENT)
    if kind == "attribute":
        return getattr(value, key, ABSENT)
    if kind == "cell":
        return contents_of(value)
    if kind == "condition":
        return key.evaluate(value)
    if kind == "key":
        return value.get(key, ABSENT) if isinstance(value, dict) else ABSENT
    return value[key] if isinstance(value, tuple | list | deque) and key < len(value) else ABSENT


def contents_of(cell: CellType) -> Any:
    """The contents of a closure cell; `ABSENT` if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def passes(test: str, value: Any, expected: Any) -> bool:
    """Run the test of a guard."""
    if test == "same":
        return value is expected
    if test == "value":
        return is_same_value(value, expected)
    if test == "type":
        return type(value) is expected
    if test == "length":
        return type(value) is expected[0] and len(value) == expected[1]
    if test == "keys":
        return type(value) is expected[0] and [*value] == expected[1]
    if test == "contents":
        return has_contents(value, expected)
    if test == "tensor":
        return isinstance(value, Tensor) and is_same_tensor(value, expected)
    if test == "version":
        return isinstance(value, Tensor) and version_of(value) == expected
    if test == "array":
        return is_same_array(value, expected)
    assert test == "some"
    return value is not None and value is not ABSENT


def is_same_value(value: Any, expected: Any) -> bool:
    """Whether two plain values are equal and of the same type; NaN equals NaN."""
    if value is expected:
        return True
    if type(value) is not type(expected):
        return False
    if isinstance(value, float) and value == 0:
        return str(value) == str(expected)  # -0.0 == 0.0
    return bool(value == expected) or bool(value != value and expected != expected)


def has_contents(value: Any, expected: Any) -> bool:
    """Whether a container of plain values has the same elements, of the same types and in the same order."""
    if type(value) is not type(expected) or value != expected:
        return False
    if isinstance(value, dict):
        return [*value] == [*expected] and [*map(type, value.values())] == [*map(type, expected.values())]
    return isinstance(value, set | frozenset) or [*map(type, value)] == [*map(type, expected)]


def is_same_tensor(value: Tensor, expected: Tensor) -> bool:
    """Whether a tensor has the same values; NaN equals NaN."""
    if value.shape != expected.shape or value.dtype != expected.dtype or value.device != expected.device:
        return False
    with torch.no_grad():
        if same_values(value, expected):
            return True
        if value.layout != torch.strided or expected.layout != torch.strided:
            return False
        is_nan = value != value
        return torch.equal(is_nan, expected != expected) and torch.equal(value[~is_nan], expected[~is_nan])


def version_of(tensor: Tensor) -> tuple[int, int]:
    """A pair that changes when a tensor is changed in place or gets other memory."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if tensor.layout == torch.strided else 0


def text_of(value: Any) -> str:
    """A value in messages, at most 80 characters."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor {[*value.shape]}"
    name = "__name__" if isinstance(value, BuiltinFunctionType) else "__qualname__"
    text = getattr(value, name, "") if callable(value) else ""
    return text or _short.repr(value)


class _ShortTexts(reprlib.Repr):
    """Short texts without the `__repr__` of other objects, which may change them: a figure changes when it is shown."""

    def repr_instance(self, x: Any, level: int) -> str:
        package = type(x).__module__.partition(".")[0]
        is_library = package in sys.stdlib_module_names and package != "__main__"
        is_known = is_library or package in ("torch", "numpy")
        if is_known or getattr(type(x), "__repr__", None) is object.__repr__ or is_dataclass(x):
            return super().repr_instance(x, level)
        return f"a {type(x).__name__}"


_short = _ShortTexts()
_short.maxother = _short.maxstring = 80
_short.maxdict = _short.maxset = _short.maxfrozenset = 6


def is_same_array(value: Any, expected: Any) -> bool:
    """Whether a NumPy array has the same dtype, shape and elements."""
    return (
        type(value) is type(expected)
        and value.dtype == expected.dtype
        and value.shape == expected.shape
        and value.tobytes() == expected.tobytes()
    )


class ModuleTree:
    """The modules of a model: their classes, children, hooks, and forwards replaced on an instance.

    Args:
        model: the model.
        traced: qualified names of the modules whose forward was traced. A net does not call them as modules, so it
            would not run their hooks.
    """

    def __init__(self, model: nn.Module, traced: tuple[str, ...]) -> None:
        self.traced = traced
        self._named = dict(model.named_modules())
        self._modules = [*self._named.values()]
        self._classes = [*map(type, self._modules)]
        self._attributes = [*map(vars, self._modules)]
        registries = [a["_modules"] for a in self._attributes]
        self._children = [r.values() for r in registries if r]
        self._registries = registries
        self._child_names = [[*r] for r in registries]
        self._has_forward = ["forward" in a for a in self._attributes]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [(name, vars(self._named[name])[h]) for name in traced for h in hooks if name in self._named]
        # Views of dicts show later changes. The number of attributes shows a new attribute `forward`.
        self._sized: list[Any] = [*registries, *(h for _, h in self._hooks), *self._attributes]
        self._sizes = [*map(len, self._sized)]
        self._hook_sizes = [len(h) for _, h in self._hooks]
        self._found = [*chain.from_iterable(self._children)]

    def is_current(self) -> bool:
        """Whether nothing has changed since construction."""
        if [*map(len, self._sized)] != self._sizes:
            if self.change():
                return False
            self._sizes = [*map(len, self._sized)]
        return (
            all(map(operator.is_, chain.from_iterable(self._children), self._found))
            and [*map(type, self._modules)] == self._classes
        )

    def change(self) -> str:
        """The first change since construction, as a clause; "" if nothing has changed."""
        for (name, module), cls in zip(self._named.items(), self._classes, strict=True):
            if type(module) is not cls:
                return f"`{name or 'the model'}` is a {type(module).__name__}, but the step was captured with a " + (
                    cls.__name__
                )
        before = iter(self._found)
        children_before = [[next(before) for _ in r] if r else [] for r in self._child_names]
        for name, registry, names, old in zip(
            self._named, self._registries, self._child_names, children_before, strict=True
        ):
            prefix = f"{name}." if name else ""
            if [*registry] != names:
                changed = [n for n in (*registry, *names) if (n in registry) != (n in names)]
                child = prefix + (changed[0] if changed else name)
                verb = "was added" if changed and changed[0] in registry else "was removed" if changed else "was moved"
                return f"the module `{child}` {verb} after the step was captured"
            for n, module in zip(names, old, strict=True):
                if registry[n] is not module:
                    return f"the module `{prefix}{n}` was replaced after the step was captured"
        for (name, hooks), size in zip(self._hooks, self._hook_sizes, strict=True):
            if len(hooks) != size:
                return f"hooks of `{name or 'the model'}` changed after the step was captured"
        for name, attributes, had_forward in zip(self._named, self._attributes, self._has_forward, strict=True):
            if ("forward" in attributes) != had_forward:
                return f"`{name + '.' if name else ''}forward` was replaced after the step was captured"
        return ""


@dataclass(frozen=True)
class GuardSources:
    """The reads of one capture, by name, from which its guards can be collected again without a capture.

    Args:
        entry: name of the method that computes one step.
        traced: qualified names of the modules whose forward was traced.
        opaque: qualified names of the modules that were not traced.
        reads: `(module, attribute)` pairs that the model's code read.
        state: `(module, attribute)` pairs that are slots, or set before they are read.
        flags: the training flag of each module in the traces.
        variables: `(Python module, name)` pairs of global variables that are set before they are read.
        refusal: why the guards cannot be collected again, as a clause; "" if they can.
    """

    entry: str
    traced: tuple[str, ...]
    opaque: tuple[str, ...]
    reads: tuple[tuple[str, str], ...]
    state: tuple[tuple[str, str], ...]
    flags: tuple[tuple[str, bool], ...]
    variables: tuple[tuple[str, str], ...] = ()
    refusal: str = ""


@dataclass
class Guards:
    """All guards of a program.

    Args:
        reads: the guards of values, each after the guards that its path needs.
        tree: the modules of the model; None for a program without a model of its own, such as a first step.
        modes: the modes of torch that the model's code reads (keys of `MODES`), with their values at capture.
        stale: a change that happened before this copy of the guards was made; "" if there was none.
        sources: the reads of each capture that the program serves.
    """

    reads: list[Guard] = field(default_factory=list)
    tree: ModuleTree | None = None
    modes: dict[str, Any] = field(default_factory=dict)
    stale: str = ""
    sources: tuple[GuardSources, ...] = ()

    def have_same_reads(self, other: Guards) -> bool:
        """Whether two programs depend on the same values."""
        a, b = self.reads, other.reads
        return (
            [(g.root, g.path, g.test, g.shown) for g in a] == [(g.root, g.path, g.test, g.shown) for g in b]
            and all(_is_same_expectation(g, h) for g, h in zip(a, b, strict=True))
            and self.modes == other.modes
        )

    def union(self, other: Guards) -> Guards:
        """The guards of a program that serves as the program of two captures."""
        known = {(g.root, g.path, g.test) for g in self.reads}
        more = [g for g in other.reads if (g.root, g.path, g.test) not in known]
        # Both values of the training flags have led to the same program.
        reads = [g for g in (*self.reads, *more) if g.path != (("instance", "training"),)]
        modes, stale = {**self.modes, **other.modes}, self.stale or other.stale
        return Guards(reads, self.tree, modes, stale, self.sources + other.sources)

    def packed(self, model: nn.Module) -> PackedGuards:
        """A record without references into the model, which can be copied and pickled."""
        stale = self.stale or (self.tree.change() if self.tree is not None else "")
        reads = []
        for guard in self.reads:
            expected = guard.expected
            if guard.test in ("same", "version"):
                holds = guard.holds(model)
                if not holds and not stale:
                    stale = f"`{guard.name}` was replaced after the step was captured"
                kept = isinstance(expected, _Sentinel)
                expected = expected if kept else _Sentinel.OF_COPY if holds else _Sentinel.STALE
            reads.append(replace(guard, expected=expected))
        traced = self.tree.traced if self.tree is not None else None
        return PackedGuards(reads, traced, dict(self.modes), stale, self.sources)


def _is_same_expectation(a: Guard, b: Guard) -> bool:
    if a.expected is b.expected:
        return True
    test = a.test if a.test in ("contents", "tensor", "array") else "value"
    return a.test != "same" and passes(test, a.expected, b.expected)


@dataclass(frozen=True)
class PackedGuards:
    """See `Guards.packed`."""

    reads: list[Guard]
    traced: tuple[str, ...] | None
    modes: Mapping[str, Any]
    stale: str
    sources: tuple[GuardSources, ...] = ()

    def unpacked(self, model: nn.Module) -> Guards:
        """The guards of a copy of the model."""
        tree = None if self.traced is None else ModuleTree(model, self.traced)
        return Guards([*self._reads_of(model)], tree, dict(self.modes), self.stale, self.sources)

    def _reads_of(self, model: nn.Module) -> Iterator[Guard]:
        for guard in self.reads:
            if guard.expected is _Sentinel.OF_COPY:
                value = guard.resolve(model)
                if guard.test == "version":
                    value = version_of(value) if isinstance(value, Tensor) else _Sentinel.STALE
                guard = replace(guard, expected=value)
            yield guard
