"""Find the states before the first step, mostly numbers that are passed to the kernel.

The start graph of a loop computes them. If it cannot, because a module initialises its own state in its first step,
they are found by comparison: the first step has the expressions of a later step with initial values instead of states,
so matching both expression graphs binds each state to its initial value.
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
    """The states before the first step: numbers, functions of constants, or results of the start graph.

    Args:
        numbers: for each state, its number, or None.
        computed: for each state without a number, the value of `replay` that it is; None: the start graph computes it.
        replay: computes states from constants.
        fetch: for each constant that `replay` reads: the number of its value and a function that fetches it.
        depends_on_sizes: whether the numbers or the replay hold for inputs of the recorded sizes only.
    """

    numbers: tuple[float | None, ...]
    computed: tuple[int | None, ...]
    replay: Replay
    fetch: tuple[tuple[int, Callable[[Sequence[Any]], Tensor]], ...]
    depends_on_sizes: bool = False

    @property
    def needs_start(self) -> bool:
        """Whether the start graph has to run."""
        return any(n is None and c is None for n, c in zip(self.numbers, self.computed, strict=True))

    def values(
        self, constants: Sequence[Any], x_seq: Sequence[Tensor], start: Callable[[], fx.GraphModule]
    ) -> list[Tensor | float]:
        """The states, numbers or tensors, computed under autograd."""
        if None not in self.numbers:
            return list(self.numbers)  # type: ignore[arg-type]
        if self.needs_start:
            states, _ = start().forward(*constants, *[x[0] for x in x_seq])
            return [s if n is None else n for s, n in zip(states, self.numbers, strict=True)]
        known = {number: fetch(constants) for number, fetch in self.fetch}
        wanted = [c for c in self.computed if c is not None]
        values = dict(zip(wanted, self.replay.run(known, wanted), strict=True))
        return [values[c] if n is None else n for c, n in zip(self.computed, self.numbers, strict=True)]  # type: ignore[index]


Fetcher = Callable[[Tensor], Callable[[Sequence[Any]], Tensor]]


def initial_states_of_start(start: Recording, fetcher: Fetcher) -> InitialStates:
    """Initial states from a recording of the start graph, which has them as its outputs.

    Raises:
        LoweringRefused: the start graph is not element-wise.
    """
    translated = translate(start)
    return _initial_states(translated, start, translated.expressions.outputs, fetcher)


def initial_states_by_comparison(later: Recording, first: Recording, fetcher: Fetcher) -> InitialStates:
    """Initial states by comparing the recordings of a later step and of the first step.

    Raises:
        LoweringRefused: the expressions of the first step do not match those of a later step.
    """
    after, before = translate(later, for_comparison=True), translate(first, for_comparison=True)
    a, b = after.expressions, before.expressions
    pairs = list(zip((*a.outputs, *a.next_states), (*b.outputs, *b.next_states), strict=True))
    comparison = _StateComparison(
        lambda i, j: _provenance(after.operands[i], later) == _provenance(before.operands[j], first)
    )
    bound: dict[int, Expression] | None = {}
    for pair in pairs:
        bound = comparison.matched(*pair, bound) if bound is not None else None
    if bound is None:
        raise LoweringRefused("the first step computes something else than the later steps")
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
    """Matches the expressions of two steps; binds states of the first to expressions of the second."""

    def __init__(self, same_operand: Callable[[int, int], bool]) -> None:
        self.same_operand = same_operand

    def matched(self, a: Expression, b: Expression, bound: dict[int, Expression]) -> dict[int, Expression] | None:
        """The extended bindings under which both expressions are equal; None if there are none."""
        a, b = _uncast(a), _uncast(b)
        if a.op == "state":
            return {**bound, a.index: b} if bound.get(a.index, b) is b else None
        if a.op != b.op or len(a.operands) != len(b.operands):
            return None
        if a.op in ("scalar", "invariant"):
            return bound if self.same_operand(a.index, b.index) else None
        if (a.index, repr(a.value)) != (b.index, repr(b.value)):
            return None
        extended = self._all(a.operands, b.operands, bound)
        if extended is None and a.op in ("add", "mul"):
            # PyTorch moves a number on the left side of a commutative operator to the right.
            extended = self._all(a.operands, b.operands[::-1], bound)
        return extended

    def _all(
        self, a: Sequence[Expression], b: Sequence[Expression], bound: dict[int, Expression]
    ) -> dict[int, Expression] | None:
        extended: dict[int, Expression] | None = bound
        for left, right in zip(a, b, strict=True):
            extended = self.matched(left, right, extended) if extended is not None else None
        return extended


def _uncast(expression: Expression) -> Expression:
    """Strip casts: the first step may have its states in another dtype."""
    while expression.op == "cast":
        expression = expression.operands[0]
    return expression


def _provenance(number: int, recording: Recording) -> Any:
    """The computation of a value from constants, comparable between recordings of the same modules."""
    value = recording.values[number]
    if value.origin == "constant":
        tensor = recording.constants[value.index]
        # A tensor that the step creates is another object in each recording, so single numbers compare by value.
        return (id(tensor), tuple(tensor.shape)) if tensor.numel() != 1 else tensor.detach().double().flatten().tolist()
    assert value.call is not None
    operands = [_provenance(r, recording) for r in value.call.references()]
    return (str(value.call.target), value.call.results.index(number), _plain_arguments(value.call.args), operands)


def _plain_arguments(arguments: Any) -> str:
    """Arguments without the tensors among them."""
    return repr(pytree.tree_map(lambda a: None if isinstance(a, ValueReference) else a, arguments))
