"""The states before the first step of a loop whose states have different shapes."""

from __future__ import annotations

import dataclasses

from snnfx.lowering.aten_recording import LoweringRefused, Recording
from snnfx.lowering.elementwise.initial_states import InitialStates, initial_states_of_start
from snnfx.lowering.elementwise.translation import Replay

__all__ = ["initial_states_of_each"]


def initial_states_of_each(start: Recording) -> InitialStates:
    """From a recording of the graph that gives them as its outputs: numbers, or else that graph is run."""
    numbers = [_number(dataclasses.replace(start, outputs=[number], next_states=[])) for number in start.outputs]
    return InitialStates(tuple(numbers), (None,) * len(numbers), Replay([]), ())


def _number(start: Recording) -> float | None:
    try:
        return initial_states_of_start(start, lambda tensor: lambda given: tensor).numbers[0]
    except LoweringRefused:
        return None
