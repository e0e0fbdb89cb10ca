"""What the forward pass of a loop keeps for its backward pass: a minimum vertex cut over the values of a step.

Elementwise values, views and concatenations may be computed again from what is kept; products and convolutions may not.
The cut is that of `snnfx.lowering.elementwise.saved_values`, on values instead of expressions and without the edge
through time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from snnfx.lowering.aten_recording import Recording
from snnfx.lowering.mixed.schedule import Kinds

__all__ = ["LoopSavedValues", "plan_saved_values"]

_INPUT = 0.25
"""Of an input that is kept, as a part of the price of its size: what is in front often keeps it anyway."""
_CHEAP = ("cat", "stack")


@dataclass(frozen=True)
class LoopSavedValues:
    """Values of the forward pass that are kept at all steps.

    Args:
        values: that a step computes.
        states: numbers of the states whose values before each step are kept.
        inputs: numbers of the inputs that are kept.
    """

    values: tuple[int, ...]
    states: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def saved(self) -> tuple[int, ...]:
        """All that takes memory of its own."""
        return (*self.values, *self.states)


def plan_saved_values(recording: Recording, kinds: Kinds, needed: Iterable[int]) -> LoopSavedValues:
    """The cheapest values from which those that the backward pass needs can be computed."""
    values = recording.values
    graph = nx.DiGraph()
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
        if kind == "view":
            graph.add_edge((number, "in"), (number, "out"))
        else:
            graph.add_edge((number, "in"), (number, "out"), capacity=_price(recording, number))
        if call is None or (kind == "heavy" and call.name not in _CHEAP):
            graph.add_edge("source", (number, "in"))
            continue
        for operand in call.references():
            if values[operand].varying:
                graph.add_edge((operand, "out"), (number, "in"))
                stack.append(operand)
    for number in targets:
        graph.add_edge((number, "out"), "sink")
    if not targets:
        return LoopSavedValues((), (), ())
    _, (reachable, _) = nx.minimum_cut(graph, "source", "sink")
    cut = sorted(n for n in seen if (n, "in") in reachable and (n, "out") not in reachable)
    return LoopSavedValues(
        tuple(n for n in cut if values[n].call is not None),
        tuple(values[n].index for n in cut if values[n].origin == "state"),
        tuple(values[n].index for n in cut if values[n].origin == "sequence"),
    )


def _price(recording: Recording, number: int) -> float:
    """Bytes of a sample: the choice is the same for all sizes of the batch."""
    value = recording.values[number]
    price = float(value.dtype.itemsize)
    for size in value.shape[1:]:
        price *= size
    return price * (_INPUT if value.origin == "sequence" else 1.0)
