"""Refuse a step that changes variables or objects outside the model; a net would not repeat the change.

A step that sets a global variable before it reads the variable computes its value anew: it needs no slot.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.capture.attribute_slots import is_number
from snnfx.capture.guarded_reads import ReachableCode, variables_of
from snnfx.capture.outside_objects import OutsideAttribute, OutsideObjects
from snnfx.capture.proxy import StepProxy
from snnfx.capture.variable_accesses import ATTRIBUTE, VariableAccesses
from snnfx.errors import CaptureError
from snnfx.ir.guards import ABSENT, CellRoot, NamespaceRoot, contents_of, is_same_value, text_of
from snnfx.ir.nodes import is_size
from snnfx.sandbox.contents_snapshot import MISSING, Change, ContentsSnapshot
from snnfx.sandbox.user_code import format_location

__all__ = ["VariableChanges"]

_MOST_ELEMENTS = 10_000
"""Longer containers count as data that no step changes."""

_MAX_DEPTH = 4


class VariableChanges:
    """A context that restores the variables outside the model that a trace changes, and refuses the change.

    A container that only grows is a log or a cache: the net ignores it. So it does a global variable that the step
    sets before it reads it, unless only code outside of the step can read the tensor in it.

    Args:
        code: the code that the step can reach.

    Attributes:
        growing: the containers that grew, by id.
    """

    def __init__(self, code: ReachableCode) -> None:
        self._code = code
        self.growing: dict[int, Any] = {}
        self._set: set[tuple[str, str]] = set()
        self._read_first: set[tuple[str, str]] = set()

    @property
    def set_before_read(self) -> set[tuple[str, str]]:
        """The global variables that each trace sets before it reads them: Python module and name."""
        return self._set - self._read_first

    def __enter__(self) -> None:
        self._stored: dict[_Variable, tuple[Any, types.FunctionType]] = {}
        values: dict[str, Any] = {}
        for function, reads in self._code.functions.items():
            for name in reads.stored_globals:
                namespace = NamespaceRoot(function.__globals__)
                self._stored.setdefault((namespace, name), (_contents(namespace, name), function))
            free = function.__code__.co_freevars
            for name in reads.stored_closure:
                cell = CellRoot(function, free.index(name))
                self._stored.setdefault((cell, name), (_contents(cell, name), function))
            for value, _, root, (_, name) in variables_of(function, reads):
                if isinstance(value, dict | list) and len(value) <= _MOST_ELEMENTS:
                    values[f"{function.__module__}.{name}" if isinstance(root, NamespaceRoot) else root.name] = value
        self._contents = ContentsSnapshot(values)
        self._objects = OutsideObjects(self._code).attributes
        names = {attribute.name for attribute in self._objects}
        variables = ((r.namespace, n) for r, n in self._stored if isinstance(r, NamespaceRoot))
        self._accesses = VariableAccesses(variables, names)
        self._accesses.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._accesses.__exit__()
        now = {variable: _contents(*variable) for variable in self._stored}
        kept = self._values_of_one_step(now)
        for root, name in self._stored:
            if isinstance(root, NamespaceRoot):
                key = id(root.namespace), name
                self._set |= {(root.name, name)} if key in self._accesses.set else set()
                self._read_first |= {(root.name, name)} if key in self._accesses.read_first else set()
        changed = [
            (variable, old, now[variable], function)
            for variable, (old, function) in self._stored.items()
            if variable not in kept and not _is_same(now[variable], old)
        ]
        changes = [c for name, value in self._contents.values.items() for c in self._contents.changes(name, value)]
        for (root, name), (old, _) in self._stored.items():
            _restore(root, name, old)
        assigned = self._assigned_attributes()
        if any(_is_state(change) or _contains_recorded(change.new) for change in changes):
            self._contents.restore()
        for change in changes:
            container = self._contents.values[change.path[0]]
            for key in change.path[1:-1]:
                container = container[key] if isinstance(container, dict | list | tuple) else vars(container)[key]
            self.growing[id(container)] = container
        if error is not None:
            return
        for (root, name), old, new, function in changed:
            code = function.__code__
            where = format_location((code.co_filename, code.co_firstlineno))
            if isinstance(root, NamespaceRoot) and not self._is_read(root, name):
                raise _refusal_of_result(name, where)
            raise _refusal(name, old, new, where)
        for attribute, new in assigned:
            raise _refusal(attribute.shown, attribute.old, new, "")
        for change in changes:
            if _is_state(change):
                name = change.path[0] + "".join(f"[{key!r}]" for key in change.path[1:])
                raise _refusal(name, change.old, change.new, "")

    def _assigned_attributes(self) -> list[tuple[OutsideAttribute, Any]]:
        """The attributes of outside objects that are state, with their new values; all get their old values again.

        A constant that a step stores once is a cache and stays. A value that no code reads is a log.
        """
        changed = [(a, new) for a in self._objects if not _is_same(new := a.now(), a.old)]
        first = {name for namespace, name in self._accesses.read_first if namespace == ATTRIBUTE}
        of_modules = {a.name for a, _ in changed if isinstance(a.owner, types.ModuleType)}
        read = {name for reads in self._code.functions.values() for name in reads.read_attributes}
        for attribute, _ in changed:
            self._set.add(("", attribute.name))
        self._read_first |= {("", name) for name in (first & read) | of_modules}
        caches = [(a, new) for a, new in changed if _is_cache(a.old, new)]
        for attribute, _ in changed:
            if all(attribute is not cache for cache, _ in caches):
                attribute.restore()
        return [
            (a, new)
            for a, new in changed
            if (a.name in first or a.name in of_modules)
            and (a.name in read or a.name in of_modules)
            and all(a is not cache for cache, _ in caches)
        ]

    def _values_of_one_step(self, now: dict[_Variable, Any]) -> set[_Variable]:
        """The global variables that carry no value from step to step, and that no other code needs."""
        return {
            (root, name)
            for root, name in self._stored
            if isinstance(root, NamespaceRoot)
            and (id(root.namespace), name) not in self._accesses.read_first
            and (self._is_read(root, name) or not isinstance(now[root, name], StepProxy | Tensor))
        }

    def _is_read(self, root: NamespaceRoot, name: str) -> bool:
        return (id(root.namespace), name) in self._accesses.read


_Variable = tuple[NamespaceRoot | CellRoot, str]


def _contents(root: NamespaceRoot | CellRoot, name: str) -> Any:
    if isinstance(root, NamespaceRoot):
        return root.namespace.get(name, ABSENT)
    return contents_of(root.cell)


def _restore(root: NamespaceRoot | CellRoot, name: str, old: Any) -> None:
    if isinstance(root, CellRoot):
        if old is not ABSENT:
            root.cell.cell_contents = old
    elif old is ABSENT:
        root.namespace.pop(name, None)
    else:
        root.namespace[name] = old


def _is_same(new: Any, old: Any) -> bool:
    plain = (bool, int, float, complex, str, bytes)
    return new is old or (isinstance(old, plain) and is_same_value(new, old))


def _is_state(change: Change) -> bool:
    """Whether a step replaces a number or tensor, or stores one that depends on its inputs in a dict.

    Any other container that grows is a log or a cache.
    """
    if change.kind not in ("dict", "list"):
        return False
    if change.old is MISSING:
        return change.kind == "dict" and type(change.new) is StepProxy and _depends_on_inputs(change.new.node)
    return isinstance(change.new, StepProxy | Tensor) or is_number(change.new)


def _is_cache(old: Any, new: Any) -> bool:
    """Whether a step stores a constant for the first time: all values that depend on its inputs are recorded."""
    return (old is None or old is ABSENT) and not _contains_recorded(new)


def _contains_recorded(value: Any) -> bool:
    """Whether a value is recorded, or a container or an object with recorded values."""
    return any(isinstance(tensor, StepProxy) for tensor in _leaves(value, 0))


def _leaves(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple | set) and depth < _MAX_DEPTH:
        for element in [*(value.values() if isinstance(value, dict) else value)]:
            yield from _leaves(element, depth + 1)
    else:
        yield value


def _depends_on_inputs(node: Node) -> bool:
    """Whether a recorded value depends on more than constants and the sizes of the inputs."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op in ("placeholder", "get_attr") or current.op == "call_module":
            return True
        for operand in current.all_input_nodes:
            if operand not in seen and not is_size(current):
                seen.add(operand)
                stack.append(operand)
    return False


def _refusal(name: str, old: Any, new: Any, where: str) -> CaptureError:
    return CaptureError(
        "SNNFX218",
        f"a step changes the variable `{name}`",
        where=where,
        why=f"it is {_shown(old)} before and {_shown(new)} after, but a net carries only attributes of modules across "
        "steps.",
        hint='Store the value in the module: call self.register_memory("value", initial) in a '
        "snnfx.MemoryModule, and assign self.value in the step.",
    )


def _refusal_of_result(name: str, where: str) -> CaptureError:
    return CaptureError(
        "SNNFX226",
        f"a step stores a tensor in the global variable `{name}` for code outside of the model",
        where=where,
        why="the step itself never reads the variable, and a net does not set it.",
        hint="Return the tensor with the outputs of the step.",
    )


def _shown(value: Any) -> str:
    if value is MISSING:
        return text_of(ABSENT)
    return "a tensor" if isinstance(value, StepProxy | Tensor) else text_of(value)
