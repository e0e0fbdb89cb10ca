"""Loops over time in C++, in which one loop over the elements of a block does several time steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snnfx.lowering.elementwise.cpp.cpp_writer import CppWriter, indented
from snnfx.lowering.elementwise.expressions import Expression, topological

__all__ = ["Instant", "State", "elements", "steps_at_once", "time_loops"]


@dataclass(frozen=True)
class State:
    """What is handed on from step to step, kept in an array of the block.

    Args:
        name: of the array.
        ctype: of its elements.
        leaf: stands for it in a step; None: no step reads it.
        following: its value after the step; None: zero.
    """

    name: str
    ctype: str
    leaf: Expression | None
    following: Expression | None


@dataclass
class Instant:
    """One time step of a kernel, before it is written.

    Args:
        first: lines of their own before everything else.
        declarations: pointers to the operands of the step.
        at_hand: text of the leaves.
        writes: arrays and what is written to them.
        adds: arrays and what is added to them.
        after: lines after the loop over the elements.
    """

    first: list[str] = field(default_factory=list)
    declarations: list[str] = field(default_factory=list)
    at_hand: dict[Expression, str] = field(default_factory=dict)
    writes: list[tuple[str, Expression]] = field(default_factory=list)
    adds: list[tuple[str, Expression]] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def read(self, writer: CppWriter, leaf: Expression, line: str, name: str) -> None:
        """A leaf is read through a pointer, which a line declares."""
        self.declarations.append(line)
        self.at_hand[leaf] = writer.read(leaf, name)

    def write(self, writer: CppWriter, value: Expression, operand: str, memory: str, t: str, name: str) -> None:
        """A value is written to an operand."""
        line, afterwards = writer.target(operand, memory, value.dtype, t, name)
        self.declarations += [line] if line else []
        self.after += [afterwards] if afterwards else []
        self.writes.append((name, value))


_MOST_STEPS = 4
"""Time steps that one loop over the elements does, at most: then the rows of two operands fill a cache of 8 ways."""

_STREAMS = 12
"""Rows of memory that a loop over the elements goes through at the same time, at most."""

_OPERATIONS = 160
"""In a loop over the elements, at most, where it does several time steps."""


def steps_at_once(roots: Sequence[Expression], streams: int, states: Sequence[State]) -> int:
    """Time steps that one loop over the elements does.

    States are then read and written once for several steps, and more rows of memory are on their way at the same time:
    a quarter to a third faster than single steps.
    """
    operations = sum(1 for e in topological(roots) if e.operands)
    steps = _MOST_STEPS
    while steps > 1 and (not states or steps * streams > _STREAMS or steps * operations > _OPERATIONS):
        steps //= 2
    return steps


def time_loops(
    writer: CppWriter,
    roots: Sequence[Expression],
    states: Sequence[State],
    at: Callable[[str, str], Instant],
    steps: int,
    backwards: bool = False,
) -> list[str]:
    """The loops over time: one in strides of some steps, and one for the steps that are left.

    Args:
        writer: of the kernel.
        roots: what each step computes.
        states: what is handed on.
        at: makes a step, given the text of its time and what its pointers' names end with.
        steps: of a stride, see `steps_at_once`.
        backwards: from the last step to the first.
    """
    lines = [f"i64 t = {'a.T' if backwards else '0'};"]
    for stride in sorted({steps, 1}, reverse=True):
        lines += _loop(writer, roots, states, at, stride, backwards)
    return lines


def _loop(
    writer: CppWriter,
    roots: Sequence[Expression],
    states: Sequence[State],
    at: Callable[[str, str], Instant],
    steps: int,
    backwards: bool,
) -> list[str]:
    """The loop over time from where `t` is, as long as a stride is left."""
    if backwards:
        head = f"for (; t >= {steps}; t -= {steps}) {{"
        times = [f"(t - {k + 1})" for k in range(steps)]
    else:
        head = f"for (; t + {steps} <= a.T; t += {steps}) {{"
        times = [f"(t + {k})" for k in range(steps)]
    instants = [at(t, f"_{k}" if k else "") for k, t in enumerate(times)]
    lines = [line for instant in instants for line in (*instant.first, *instant.declarations)]
    lines += ["EACH", "for (i64 i = 0; i < n; i++) {"]
    lines += [f"  {s.ctype} {s.name}_now = {f'{s.name}[i]' if s.leaf is not None else '0'};" for s in states]
    for instant in instants:
        lines += ["  {", *indented(elements(writer, roots, states, instant), 2), "  }"]
    lines += [*(f"  {s.name}[i] = {s.name}_now;" for s in states), "}"]
    lines += [line for instant in instants for line in instant.after]
    return [head, *indented(lines, 1), "}"]


def elements(writer: CppWriter, roots: Sequence[Expression], states: Sequence[State], instant: Instant) -> list[str]:
    """What one step does for one element."""
    at_hand = dict(instant.at_hand)
    for state in states:
        if state.leaf is not None:
            is_bool = state.leaf.dtype == "bool"
            at_hand[state.leaf] = f"({state.name}_now != 0)" if is_bool else f"{state.name}_now"
    lines, names = writer.body(roots, at_hand)
    lines += [f"{name}[i] = {_stored(names, e)};" for name, e in instant.writes]
    lines += [f"{name}[i] += {_stored(names, e)};" for name, e in instant.adds]
    moved = [s for s in states if s.leaf is None or s.following is not s.leaf]
    following = [(s, "0" if s.following is None else _stored(names, s.following)) for s in moved]
    lines += [f"const {s.ctype} {s.name}_next = {value};" for s, value in following]
    lines += [f"{s.name}_now = {s.name}_next;" for s, _ in following]
    return lines


def _stored(names: dict[Expression, str], expression: Expression) -> str:
    return f"({names[expression]} ? 1.0f : 0.0f)" if expression.dtype == "bool" else names[expression]
