"""The states before the first step: mostly numbers, which a kernel is passed.

The graph that starts a loop gives them. Where it cannot, because a module makes its states itself in its first step,
they are found by comparison: the first step computes what every step computes, with initial values in the places of the
states, so walking through the expressions of both at once tells what stands for each state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from snnfx.lowering.aten_recording import LoweringRefused, Recording, ValueReference
from snnfx.lowering.elementwise.expressions import Expression
from snnfx.lowering.elementwise.translation import Replay, TranslatedStep, translate
from snnfx.sandbox.torch_internals import pytree

__all__ = ["InitialStates", "initial_states_by_comparison", "initial_states_of_start"]


@dataclass
class InitialStates:
    """How to get the states before the first step.

    Args:
        numbers: of each state; None: it is computed.
        computed: the values of `replay` for those that constants alone give; None: by running the start of the loop.
        replay: computes them.
        fetch: the constants that it starts from, by number of their value.
    """

    numbers: tuple[float | None, ...]
    computed: tuple[int | None, ...]
    replay: Replay
    fetch: tuple[tuple[int, Callable[[Sequence[Any]], Tensor]], ...]

    @property
    def needs_start(self) -> bool:
        """Whether the start of the loop has to be run."""
        return any(n is None and c is None for n, c in zip(self.numbers, self.computed, strict=True))

    def values(
        self, constants: Sequence[Any], x_seq: Sequence[Tensor], start: Callable[[], fx.GraphModule]
    ) -> list[Tensor | float]:
        """The states, numbers or tensors; autograd sees how they are computed."""
        if None not in self.numbers:
            return list(self.numbers)  # type: ignore[arg-type]
        if self.needs_start:
            states, _ = start().forward(*constants, *[x[0] for x in x_seq])
            return [s if n is None else n for s, n in zip(states, self.numbers, strict=True)]
        known = {number: fetch(constants) for number, fetch in self.fetch}
        wanted = [c for c in self.computed if c is not None]
        found = dict(zip(wanted, self.replay.run(known, wanted), strict=True))
        return [found[c] if n is None else n for c, n in zip(self.computed, self.numbers, strict=True)]  # type: ignore[index]


Fetcher = Callable[[Tensor], Callable[[Sequence[Any]], Tensor]]


def initial_states_of_start(start: Recording, fetcher: Fetcher) -> InitialStates:
    """From a recording of the graph that gives the states before the first step as its outputs.

    Raises:
        LoweringRefused: they are no values of elements.
    """
    translated = translate(start)
    return _initial_states(translated, start, translated.expressions.outputs, fetcher)


def initial_states_by_comparison(later: Recording, first: Recording, fetcher: Fetcher) -> InitialStates:
    """From recordings of a later step and of the first one.

    Raises:
        LoweringRefused: the first step does something else than the others.
    """
    after, before = translate(later, to_compare=True), translate(first, to_compare=True)
    a, b = after.expressions, before.expressions
    pairs = list(zip((*a.outputs, *a.next_states), (*b.outputs, *b.next_states), strict=True))
    comparison = _StateComparison(
        lambda i, j: _described(after.operands[i], later) == _described(before.operands[j], first)
    )
    bound: dict[int, Expression] | None = {}
    for pair in pairs:
        bound = comparison.matched(*pair, bound) if bound is not None else None
    if bound is None:
        raise LoweringRefused("the first step does something else than the others")
    # A state that no step reads may have any value.
    values = [bound.get(index) for index in range(len(later.next_states))]
    return _initial_states(before, first, values, fetcher)


def _initial_states(
    translated: TranslatedStep, recording: Recording, values: Sequence[Expression | None], fetcher: Fetcher
) -> InitialStates:
    numbers: list[float | None] = []
    computed: list[int | None] = []
    for value in values:
        expression = value and _uncast(value)
        if expression is None or expression.op == "constant":
            numbers.append(0.0 if expression is None else expression.value)
            computed.append(None)
        else:
            numbers.append(None)
            is_operand = expression.op in ("scalar", "invariant")
            computed.append(translated.operands[expression.index] if is_operand else None)
    needed = {r for c in translated.prologue.calls for r in c.references()} | set(translated.operands)
    fetch = tuple(
        (n, fetcher(recording.constants[v.index]))
        for n, v in enumerate(recording.values)
        if v.origin == "constant" and n in needed
    )
    return InitialStates(tuple(numbers), tuple(computed), translated.prologue, fetch)


class _StateComparison:
    """Walks through the expressions of two steps at once, and binds states of one to expressions of the other."""

    def __init__(self, same_operand: Callable[[int, int], bool]) -> None:
        self.same_operand = same_operand

    def matched(self, a: Expression, b: Expression, bound: dict[int, Expression]) -> dict[int, Expression] | None:
        """The bindings under which both are the same, None where there are none."""
        a, b = _uncast(a), _uncast(b)
        if a.op == "state":
            return {**bound, a.index: b} if bound.get(a.index, b) is b else None
        if a.op != b.op or len(a.operands) != len(b.operands):
            return None
        if a.op in ("scalar", "invariant"):
            return bound if self.same_operand(a.index, b.index) else None
        if (a.index, repr(a.value)) != (b.index, repr(b.value)):
            return None
        found = self._all(a.operands, b.operands, bound)
        if found is None and a.op in ("add", "mul"):
            # PyTorch puts a number that stands on the left to the right.
            found = self._all(a.operands, b.operands[::-1], bound)
        return found

    def _all(
        self, a: Sequence[Expression], b: Sequence[Expression], bound: dict[int, Expression]
    ) -> dict[int, Expression] | None:
        found: dict[int, Expression] | None = bound
        for left, right in zip(a, b, strict=True):
            found = self.matched(left, right, found) if found is not None else None
        return found


def _uncast(expression: Expression) -> Expression:
    """Without a change of dtype: the first step may have its states in another one."""
    while expression.op == "cast":
        expression = expression.operands[0]
    return expression


def _described(number: int, recording: Recording) -> Any:
    """How a value comes about from constants, comparable between recordings of the same modules."""
    value = recording.values[number]
    if value.origin == "constant":
        tensor = recording.constants[value.index]
        # One made by the step itself is another object in each recording.
        return (id(tensor), tuple(tensor.shape)) if tensor.numel() != 1 else tensor.detach().double().flatten().tolist()
    assert value.call is not None
    operands = [_described(r, recording) for r in value.call.references()]
    return (str(value.call.target), value.call.results.index(number), _plain(value.call.args), operands)


def _plain(arguments: Any) -> str:
    """Arguments without the tensors among them."""
    return repr(pytree.tree_map(lambda a: None if isinstance(a, ValueReference) else a, arguments))
