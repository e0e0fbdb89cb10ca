"""Initial states of a loop whose states have different shapes.

The start graph computes them. If a module initialises its own state in its first step, they are found by comparison:
the recording of the first step makes the calls of a later step, on initial values instead of states.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from snnfx.lowering.aten_recording import LoweringRefused, Recording, ValueReference
from snnfx.lowering.elementwise.initial_states import InitialStates, initial_states_of_start
from snnfx.lowering.elementwise.translation import Replay

__all__ = ["initial_states_by_calls", "initial_states_of_each"]


def initial_states_of_each(start: Recording) -> InitialStates:
    """Find the initial states that are numbers; the others are computed by running the start graph.

    Args:
        start: recording of the graph whose outputs are the states before the first step.
    """
    numbers = [_number(dataclasses.replace(start, outputs=[number], next_states=[])) for number in start.outputs]
    return InitialStates(tuple(numbers), (None,) * len(numbers), Replay([]), ())


def initial_states_by_calls(later: Recording, first: Recording) -> InitialStates:
    """Find initial states that are numbers by comparing the calls of a later step and of the first step.

    Raises:
        LoweringRefused: the first step makes other calls than a later step, or starts from values that are no numbers.
    """
    pairs = [*zip(later.outputs, first.outputs, strict=True), *zip(later.next_states, first.next_states, strict=True)]
    comparison = _Comparison(later, first)
    if not all(comparison.match(*pair) for pair in pairs):
        raise LoweringRefused("the first step computes something else than the later steps")
    numbers = []
    for index in range(len(later.next_states)):
        start = comparison.starts.get(index)
        # A state that no call reads may have any value.
        found = 0.0 if start is None else _number(dataclasses.replace(first, outputs=[start], next_states=[]))
        if found is None:
            raise LoweringRefused("an initial state is not a number")
        numbers.append(found)
    return InitialStates(tuple(numbers), (None,) * len(numbers), Replay([]), ())


class _Comparison:
    """Matches the values of two recordings of a step.

    Args:
        later: the recording of a later step.
        first: the recording of the first step.

    Attributes:
        starts: the value of the first step that stands for each state.
    """

    def __init__(self, later: Recording, first: Recording) -> None:
        self.later, self.first = later, first
        self.starts: dict[int, int] = {}
        self._matched: dict[int, int] = {}

    def match(self, a: int, b: int) -> bool:
        """Whether value `a` of the later step and value `b` of the first step are computed alike."""
        if a in self._matched:
            return self._matched[a] == b
        self._matched[a] = b
        after, before = self.later.values[a], self.first.values[b]
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            return False
        if after.origin == "state":
            self.starts[after.index] = b
            return True
        if after.origin != before.origin:
            return False
        if after.call is None or before.call is None:
            return after.index == before.index if after.origin == "sequence" else self._is_same_constant(a, b)
        calls = after.call, before.call
        return (
            calls[0].target == calls[1].target
            and calls[0].results.index(a) == calls[1].results.index(b)
            and self._match_arguments(calls[0].args, calls[1].args)
            and self._match_arguments(calls[0].kwargs, calls[1].kwargs)
        )

    def _is_same_constant(self, a: int, b: int) -> bool:
        one = self.later.constants[self.later.values[a].index]
        other = self.first.constants[self.first.values[b].index]
        if one is other:
            return True
        # A tensor that the step creates is another object in each recording.
        return one.numel() == 1 and not one.requires_grad and torch.equal(one, other)

    def _match_arguments(self, a: Any, b: Any) -> bool:
        if isinstance(a, ValueReference) and isinstance(b, ValueReference):
            return self.match(a.number, b.number)
        if type(a) is not type(b):
            return False
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self._match_arguments(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(self._match_arguments, a, b))
        return repr(a) == repr(b)


def _number(start: Recording) -> float | None:
    try:
        return initial_states_of_start(start, lambda tensor: lambda given: tensor).numbers[0]
    except LoweringRefused:
        return None
