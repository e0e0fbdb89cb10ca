"""Choose the values that a mixed loop saves for backward.

The choice is a minimum vertex cut over one step. Element-wise values, views and concatenations may be recomputed from
saved values; products and convolutions may not. `snnfx.lowering.elementwise.saved_values` makes the same cut on
expressions, with an additional edge through time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from snnfx.analysis.vertex_cut import VertexCut
from snnfx.lowering.aten_recording import Recording
from snnfx.lowering.mixed.schedule import CallKinds

__all__ = ["LoopSavedValues", "plan_saved_values"]

_INPUT_DISCOUNT = 0.25
"""Cost of saving an input relative to its size: the layer in front often saves it anyway."""


@dataclass(frozen=True)
class LoopSavedValues:
    """Values of the forward pass that are saved for backward at all steps.

    Args:
        values: saved values that a step computes.
        states: indices of the states that are saved before each step.
        inputs: indices of the saved inputs.
    """

    values: tuple[int, ...]
    states: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def saved(self) -> tuple[int, ...]:
        """The values and states, which take memory of their own."""
        return (*self.values, *self.states)


def plan_saved_values(recording: Recording, kinds: CallKinds, needed: Iterable[int]) -> LoopSavedValues:
    """The cheapest values from which all values that the backward pass needs can be recomputed.

    Args:
        recording: the recorded step.
        kinds: the kinds of its calls.
        needed: the values that the backward pass reads.
    """
    values = recording.values
    graph = VertexCut[int]()
    stack = [n for n in needed if values[n].varying]
    targets = set(stack)
    seen: set[int] = set()
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        call = values[number].call
        kind = "source" if call is None else kinds.of(call)
        graph.add_value(number, math.inf if kind == "view" else _cost(recording, number))
        if call is None or (kind == "heavy" and not call.traits.joins):
            graph.add_source(number)
            continue
        for operand in call.references():
            if values[operand].varying:
                graph.add_operand(number, operand)
                stack.append(operand)
    for number in targets:
        graph.add_needed(number)
    cheapest = graph.cheapest()
    assert cheapest is not None, "sources have a finite cost"
    cut = sorted(cheapest)
    return LoopSavedValues(
        tuple(n for n in cut if values[n].call is not None),
        tuple(values[n].index for n in cut if values[n].origin == "state"),
        tuple(values[n].index for n in cut if values[n].origin == "sequence"),
    )


def _cost(recording: Recording, number: int) -> float:
    """Bytes of one sample, so that the choice does not depend on the batch size."""
    value = recording.values[number]
    cost = float(value.dtype.itemsize)
    for size in value.shape[1:]:
        cost *= size
    return cost * (_INPUT_DISCOUNT if value.origin == "sequence" else 1.0)
