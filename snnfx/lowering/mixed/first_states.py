"""Initial states of a loop whose states have different shapes."""

from __future__ import annotations

import dataclasses

from snnfx.lowering.aten_recording import LoweringRefused, Recording
from snnfx.lowering.elementwise.initial_states import InitialStates, initial_states_of_start
from snnfx.lowering.elementwise.translation import Replay

__all__ = ["initial_states_of_each"]


def initial_states_of_each(start: Recording) -> InitialStates:
    """Find the initial states that are numbers; the others are computed by running the start graph.

    Args:
        start: recording of the graph whose outputs are the states before the first step.
    """
    numbers = [_number(dataclasses.replace(start, outputs=[number], next_states=[])) for number in start.outputs]
    return InitialStates(tuple(numbers), (None,) * len(numbers), Replay([]), ())


def _number(start: Recording) -> float | None:
    try:
        return initial_states_of_start(start, lambda tensor: lambda given: tensor).numbers[0]
    except LoweringRefused:
        return None
