"""Check all guards of a program at a call, in one generated function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from snnfx.ir import guards as ir
from snnfx.ir.guards import ABSENT, CellRoot, FunctionRoot, Guard, ModuleRoot, NamespaceRoot
from snnfx.ir.program import StepProgram
from snnfx.runtime.watched_reads import WatchedReads
from snnfx.sandbox.torch_internals import (
    are_transforms_active,
    disable_dispatch_modes,
    dispatch_mode_count,
    function_from_source,
)

__all__ = ["GuardCheck"]


class GuardCheck:
    """The guards of one program, bound to its model.

    Args:
        program: the program.
        model: its model.
    """

    def __init__(self, program: StepProgram, model: nn.Module) -> None:
        guards = self.guards = program.guards
        self.model = model
        flags = [
            Guard(ModuleRoot(r.owner), (("instance", "training"),), "value", r.value, r.shown)
            for r in program.setting_reads
            if r.name == "training"  # flags of layers that the plan depends on
        ]
        self._reads = [*guards.reads, *flags]
        self._tree_is_current = guards.tree.is_current if guards.tree is not None else lambda: True
        self._first_failure = _compiled(self._reads, model)
        self._watched = WatchedReads(self._reads, lambda reads: _compiled(reads, model))
        self._modes = [(name, ir.MODES[name], value) for name, value in guards.modes.items()]

    def holds(self) -> bool:
        """Whether every guard holds."""
        return not self.guards.stale and self._tree_is_current() and self._reads_hold()

    def _reads_hold(self) -> bool:
        if self._watched.are_unchanged():
            return True
        self._watched.update()  # before the tests, so that it misses no change of another thread
        if self._first_failure() < 0:
            return True
        self._watched.forget()
        return False

    def modes(self) -> tuple[Any, ...] | None:
        """The current values of the modes that the model's code reads; None if they are those of the capture."""
        for _, read, value in self._modes:
            if read() != value:
                return tuple([read() for _, read, _ in self._modes])
        return None

    def failed_read(self) -> Guard | None:
        """The first guard of a value that fails."""
        index = self._first_failure()
        return None if index < 0 else self._reads[index]

    def tree_changed(self) -> bool:
        """Whether a module was replaced, added or removed, so that no part of the old plan is valid."""
        return bool(self.guards.stale) or not self._tree_is_current()

    def describe_failure(self) -> str:
        """The first guard that fails, as a clause."""
        if self.guards.stale:
            return self.guards.stale
        if self.guards.tree is not None and not self.guards.tree.is_current():
            return self.guards.tree.change()
        guard = self.failed_read()
        assert guard is not None
        now = guard.resolve(self.model)
        if guard.test == "contents":
            name, now, before = _changed_element(guard, now)
            return f"`{name}` is {now}, but the step was captured with {before}"
        shown = ir.text_of(now)
        if shown == guard.shown:  # another object that prints the same
            return f"`{guard.name}` is another {type(now).__name__} than the step was captured with"
        return f"`{guard.name}` is {shown}, but the step was captured with {guard.shown}"


def _changed_element(guard: Guard, now: Any) -> tuple[str, str, str]:
    before = guard.expected
    if type(now) is type(before) and len(now) == len(before) and isinstance(now, list | tuple | dict):
        for key in before if isinstance(before, dict) else range(len(before)):
            if isinstance(now, dict) and key not in now:
                break
            if not ir.is_same_value(now[key], before[key]):
                return f"{guard.name}[{key!r}]", ir.text_of(now[key]), ir.text_of(before[key])
    return guard.name, ir.text_of(now), guard.shown


def _compiled(reads: list[Guard], model: nn.Module) -> Callable[[], int]:
    """A function that returns the index of the first guard that fails, or -1."""
    constants: dict[str, Any] = {
        "ABSENT": ABSENT,
        "is_same_value": ir.is_same_value,
        "is_same_array": ir.is_same_array,
        "is_same_tensor": _is_same_tensor,
        "version_of": ir.version_of,
        "contents_of": ir.contents_of,
        "Tensor": Tensor,
    }
    variables: dict[tuple[Any, ...], str] = {}
    lines: list[str] = []

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def variable(root: Any, path: tuple[ir.Step, ...]) -> str:
        known = variables.get((root, path))
        if known is not None:
            return known
        if not path:
            expression = constant(_start_of(root, model))
        else:
            kind, key = path[-1]
            literal = repr(key) if type(key) in (str, int) else constant(key)
            if kind == "instance" and len(path) == 1:
                # The attributes of a module: its dict never changes identity.
                expression = f"{constant(vars(model.get_submodule(root.path)))}.get({literal}, ABSENT)"
            else:
                parent = variable(root, path[:-1])
                expression = {
                    "instance": f"{parent}.__dict__.get({literal}, ABSENT)",
                    "class": f"getattr({parent}.__class__, {literal}, ABSENT)",
                    "attribute": f"getattr({parent}, {literal}, ABSENT)",
                    "cell": f"contents_of({parent})",
                    "condition": f"{literal}.evaluate({parent})",
                    "key": f"{parent}.get({literal}, ABSENT)",
                    "item": f"{parent}[{literal}]",
                }[kind]
        name = f"v{len(variables)}"
        lines.append(f"    {name} = {expression}")
        variables[root, path] = name
        return name

    for index, guard in enumerate(reads):
        if not isinstance(guard.root, ModuleRoot | NamespaceRoot | CellRoot | FunctionRoot):
            lines.append(f"    return {index}")
            break
        fails = _failure(guard.test, variable(guard.root, guard.path), guard.expected, constant)
        lines += [f"    if {fails}:", f"        return {index}"]
    source = "\n".join(["def forward():", *lines, "    return -1", ""])
    return function_from_source(source, constants)


def _start_of(root: Any, model: nn.Module) -> Any:
    """The object that the paths of a root start from."""
    if isinstance(root, ModuleRoot):
        return model.get_submodule(root.path)
    if isinstance(root, NamespaceRoot):
        return root.namespace
    return root.cell if isinstance(root, CellRoot) else root.function


def _failure(test: str, v: str, expected: Any, constant: Callable[[Any], str]) -> str:
    """The expression that is true if the value in variable `v` fails a test."""
    c = constant(expected)
    if test == "same":
        return f"{v} is not {c}"
    if test == "value":
        return f"{v} is not {c} and not is_same_value({v}, {c})"
    if test == "type":
        return f"{v}.__class__ is not {c}"
    if test in ("length", "keys"):
        measured = f"len({v})" if test == "length" else f"[*{v}]"
        return f"{v}.__class__ is not {constant(expected[0])} or {measured} != {constant(expected[1])}"
    if test == "contents":
        fails = f"{v}.__class__ is not {constant(type(expected))} or {v} != {c}"
        if isinstance(expected, frozenset):
            return f"{v} is not {c} and ({fails})"
        if isinstance(expected, set):
            return fails
        if isinstance(expected, dict):
            fails += f" or [*{v}] != {constant([*expected])}"
        # Numbers of different types are equal.
        elements = f"{v}.values()" if isinstance(expected, dict) else v
        types = [*map(type, expected.values() if isinstance(expected, dict) else expected)]
        fails += f" or [*map(type, {elements})] != {constant(types)}"
        return f"{v} is not {c} and ({fails})" if isinstance(expected, tuple) else fails
    if test == "some":
        return f"{v} is None or {v} is ABSENT"
    if test == "array":
        return f"not is_same_array({v}, {c})"
    assert test in ("tensor", "version")
    check = f"is_same_tensor({v}, {c})" if test == "tensor" else f"version_of({v}) == {c}"
    return f"not isinstance({v}, Tensor) or not {check}"


def _is_same_tensor(value: Tensor, expected: Tensor) -> bool:
    """`guards.is_same_tensor`, but hidden from the caller's dispatch modes and transforms, which would record it."""
    if value is expected:
        return True
    if not dispatch_mode_count() and not are_transforms_active():
        return ir.is_same_tensor(value, expected)
    with disable_dispatch_modes():
        return ir.is_same_tensor(value, expected)
