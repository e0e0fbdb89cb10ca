"""Generate time loops in C++ that run several time steps per loop over elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from snnfx.lowering.elementwise.cpp.cpp_writer import CppWriter, indented
from snnfx.lowering.elementwise.expressions import Expression, topological

__all__ = ["CarriedArray", "TimeStep", "elements", "steps_at_once", "time_loops"]


@dataclass(frozen=True)
class CarriedArray:
    """A loop-carried value, stored in an array of the block.

    Args:
        name: the name of the array.
        ctype: the C type of its elements.
        leaf: the leaf that reads it in a step; None: no step reads it.
        following: its value after the step; None: zero.
    """

    name: str
    ctype: str
    leaf: Expression | None
    following: Expression | None


@dataclass
class TimeStep:
    """The code of one time step of a kernel.

    Args:
        first: lines before everything else.
        declarations: pointers to the operands of the step.
        texts: the C++ text of each expression that is read, not computed.
        writes: pairs of an array and the value that is written to it.
        adds: pairs of an array and the value that is added to it.
        after: lines after the loop over the elements.
    """

    first: list[str] = field(default_factory=list)
    declarations: list[str] = field(default_factory=list)
    texts: dict[Expression, str] = field(default_factory=dict)
    writes: list[tuple[str, Expression]] = field(default_factory=list)
    adds: list[tuple[str, Expression]] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    def read(self, writer: CppWriter, leaf: Expression, line: str, name: str) -> None:
        """Read a leaf through the pointer `name`, which `line` declares."""
        self.declarations.append(line)
        self.texts[leaf] = writer.read(leaf, name)

    def write(self, writer: CppWriter, value: Expression, operand: str, memory: str, t: str, name: str) -> None:
        """Write a value to an operand."""
        line, afterwards = writer.target(operand, memory, value.dtype, t, name)
        self.declarations += [line] if line else []
        self.after += [afterwards] if afterwards else []
        self.writes.append((name, value))


_MAX_STEPS = 4
"""Time steps of one loop over the elements, at most: the rows of two operands then fill an 8-way cache."""

_MAX_STREAMS = 12
"""Rows of memory that a loop over the elements streams at the same time, at most."""

_MAX_OPERATIONS = 160
"""Operations in a loop over the elements that runs several time steps, at most."""


def steps_at_once(roots: Sequence[Expression], streams: int, states: Sequence[CarriedArray]) -> int:
    """The number of time steps that one loop over the elements runs.

    With several steps, states are read and written once for all of them, and more rows of memory are prefetched at the
    same time: a quarter to a third faster than single steps.
    """
    operations = sum(1 for e in topological(roots) if e.operands)
    steps = _MAX_STEPS
    while steps > 1 and (not states or steps * streams > _MAX_STREAMS or steps * operations > _MAX_OPERATIONS):
        steps //= 2
    return steps


def time_loops(
    writer: CppWriter,
    roots: Sequence[Expression],
    states: Sequence[CarriedArray],
    at: Callable[[str, str], TimeStep],
    steps: int,
    backwards: bool = False,
) -> list[str]:
    """Generate the loops over time: one in strides of several steps, one for the remaining steps.

    Args:
        writer: the writer of the kernel.
        roots: the expressions that each step computes.
        states: the loop-carried values.
        at: builds the code of a step from the text of its time and a suffix for the names of its pointers.
        steps: the steps of a stride, see `steps_at_once`.
        backwards: whether to run from the last step to the first.
    """
    lines = [f"i64 t = {'a.T' if backwards else '0'};"]
    for stride in sorted({steps, 1}, reverse=True):
        lines += _loop(writer, roots, states, at, stride, backwards)
    return lines


def _loop(
    writer: CppWriter,
    roots: Sequence[Expression],
    states: Sequence[CarriedArray],
    at: Callable[[str, str], TimeStep],
    steps: int,
    backwards: bool,
) -> list[str]:
    """The loop over time, from the current `t` on, in strides."""
    if backwards:
        head = f"for (; t >= {steps}; t -= {steps}) {{"
        times = [f"(t - {k + 1})" for k in range(steps)]
    else:
        head = f"for (; t + {steps} <= a.T; t += {steps}) {{"
        times = [f"(t + {k})" for k in range(steps)]
    step_codes = [at(t, f"_{k}" if k else "") for k, t in enumerate(times)]
    lines = [line for step_code in step_codes for line in (*step_code.first, *step_code.declarations)]
    lines += ["EACH", "for (i64 i = 0; i < n; i++) {"]
    lines += [f"  {s.ctype} {s.name}_now = {f'{s.name}[i]' if s.leaf is not None else '0'};" for s in states]
    for step_code in step_codes:
        lines += ["  {", *indented(elements(writer, roots, states, step_code), 2), "  }"]
    lines += [*(f"  {s.name}[i] = {s.name}_now;" for s in states), "}"]
    lines += [line for step_code in step_codes for line in step_code.after]
    return [head, *indented(lines, 1), "}"]


def elements(
    writer: CppWriter, roots: Sequence[Expression], states: Sequence[CarriedArray], step_code: TimeStep
) -> list[str]:
    """The lines of one step for one element."""
    texts = dict(step_code.texts)
    for state in states:
        if state.leaf is not None:
            is_bool = state.leaf.dtype == "bool"
            texts[state.leaf] = f"({state.name}_now != 0)" if is_bool else f"{state.name}_now"
    lines, names = writer.body(roots, texts)
    lines += [f"{name}[i] = {_stored(names, e)};" for name, e in step_code.writes]
    lines += [f"{name}[i] += {_stored(names, e)};" for name, e in step_code.adds]
    changing = [s for s in states if s.leaf is None or s.following is not s.leaf]
    following = [(s, "0" if s.following is None else _stored(names, s.following)) for s in changing]
    lines += [f"const {s.ctype} {s.name}_next = {value};" for s, value in following]
    lines += [f"{s.name}_now = {s.name}_next;" for s, _ in following]
    return lines


def _stored(names: dict[Expression, str], expression: Expression) -> str:
    return f"({names[expression]} ? 1.0f : 0.0f)" if expression.dtype == "bool" else names[expression]
