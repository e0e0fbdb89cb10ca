"""The states before the first step, found by comparing the first step with a later one.

The first step computes what every step computes, with initial values in the places of the states. Walking through the
expressions of both at once tells what stands for each state: mostly a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from snnfx.kernels.expressions import Expression
from snnfx.kernels.record import NotLowered, Recording
from snnfx.kernels.translate import Replay, translate

__all__ = ["InitialStates", "find_initial_states"]


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

    def values(
        self, constants: Sequence[Any], x_seq: Sequence[Tensor], start: fx.GraphModule | None
    ) -> list[Tensor | float]:
        """The states, numbers or tensors; autograd sees how they are computed."""
        if None not in self.numbers:
            return list(self.numbers)  # type: ignore[arg-type]
        if None in [c for c, n in zip(self.computed, self.numbers, strict=True) if n is None]:
            assert start is not None
            states, _ = start.forward(*constants, *[x[0] for x in x_seq])
            return [s if n is None else n for s, n in zip(states, self.numbers, strict=True)]
        known = {number: fetch(constants) for number, fetch in self.fetch}
        wanted = [c for c in self.computed if c is not None]
        found = dict(zip(wanted, self.replay.run(known, wanted), strict=True))
        return [found[c] if n is None else n for c, n in zip(self.computed, self.numbers, strict=True)]  # type: ignore[index]


def find_initial_states(
    later: Recording, first: Recording, fetcher: Callable[[Tensor], Callable[[Sequence[Any]], Tensor]]
) -> InitialStates:
    """Compare the recordings of a later step and of the first one.

    Raises:
        NotLowered: the first step does something else than the others.
    """
    after, before = translate(later, simplify=False), translate(first, simplify=False)
    bound: dict[int, Expression] = {}
    seen: set[tuple[int, int]] = set()
    pairs = list(
        zip(
            (*after.expressions.outputs, *after.expressions.next_states),
            (*before.expressions.outputs, *before.expressions.next_states),
            strict=True,
        )
    )
    same_constant = _same_constants(after.operands, later, before.operands, first)
    while pairs:
        a, b = pairs.pop()
        if (a.number, b.number) in seen:
            continue
        seen.add((a.number, b.number))
        if a.op == "state":
            if bound.setdefault(a.index, b) is not b:
                raise NotLowered("the first step does something else than the others")
            continue
        same = a.op == b.op and len(a.operands) == len(b.operands)
        if same and a.op in ("scalar", "invariant"):
            same = same_constant(a.index, b.index)
        elif same:
            same = (a.index, repr(a.value)) == (b.index, repr(b.value))
        if not same:
            raise NotLowered("the first step does something else than the others")
        pairs.extend(zip(a.operands, b.operands, strict=True))
    numbers: list[float | None] = []
    computed: list[int | None] = []
    for index in range(len(later.next_states)):
        expression = bound.get(index)
        if expression is None or expression.op == "constant":
            # A state that no step reads may have any value.
            numbers.append(0.0 if expression is None else expression.value)
            computed.append(None)
        else:
            numbers.append(None)
            computed.append(before.operands[expression.index] if expression.op in ("scalar", "invariant") else None)
    needed = {r for c in before.prologue.calls for r in c.references()} | set(before.operands)
    fetch = tuple(
        (n, fetcher(first.constants[v.index]))
        for n, v in enumerate(first.values)
        if v.origin == "constant" and n in needed
    )
    return InitialStates(tuple(numbers), tuple(computed), before.prologue, fetch)


def _same_constants(
    a_operands: Sequence[int], a: Recording, b_operands: Sequence[int], b: Recording
) -> Callable[[int, int], bool]:
    def same(first: int, second: int) -> bool:
        return _described(a_operands[first], a) == _described(b_operands[second], b)

    return same


def _described(number: int, recording: Recording) -> Any:
    """How a value comes about from constants, comparable between recordings of the same modules."""
    value = recording.values[number]
    if value.origin == "constant":
        tensor = recording.constants[value.index]
        # One made by the step itself is another object in each recording.
        return (id(tensor), tuple(tensor.shape)) if tensor.numel() != 1 else tensor.detach().double().flatten().tolist()
    assert value.call is not None
    operands = [_described(r, recording) for r in value.call.references()]
    return (str(value.call.target), value.call.results.index(number), repr(value.call.args), operands)


_ = Replay
