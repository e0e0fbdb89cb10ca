"""Numbers that the code of a loop computes from the number of the iteration, as a tensor over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from snnfx.ir.facts import VALUE
from snnfx.sequence.element_reads import arithmetic_progression, record_call

__all__ = ["record_numbers"]

_ROUNDING = 1e-14
"""The largest relative difference of a number from its formula."""


def record_numbers(graph: fx.Graph, values: Sequence[Any], dtype: torch.dtype) -> Node | None:
    """Record the numbers of all iterations, for any number of iterations; None if no formula gives them.

    The formulas are arithmetic progressions, as `t`, `0.1 * t` or `1 - t / 3`, and geometric ones, as `0.9**t` or
    `math.exp(-t / 5)`.

    Args:
        graph: the graph of the call, at its insertion point.
        values: the numbers in the first iterations.
        dtype: the dtype of numbers that are not integers.
    """
    integers = arithmetic_progression(values)
    if integers is not None:
        start, step = integers
        return record_call(graph, torch.arange, (start, start + step * len(values), step))
    if len(values) < 3 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return None
    first, count = values[0], len(values)
    difference, ratio = values[1] - first, values[1] / first if first else 0.0
    if _are_close(values, [first + difference * i for i in range(count)]):
        steps = record_call(graph, torch.mul, (_counted(graph, count), difference))
        found = record_call(graph, torch.add, (steps, first))
    elif ratio > 0 and _are_close(values, [first * ratio**i for i in range(count)]):
        powers = record_call(graph, torch.pow, (ratio, _counted(graph, count)))
        found = record_call(graph, torch.mul, (powers, first))
    else:
        return None
    if dtype == torch.float64:
        return found
    rounded = graph.call_method("to", (found, dtype))
    VALUE.set(rounded, VALUE.of(found).to(dtype))
    return rounded


def _counted(graph: fx.Graph, count: int) -> Node:
    return record_call(graph, torch.arange, (0, count, 1), dtype=torch.float64)


def _are_close(values: Sequence[float], expected: Sequence[float]) -> bool:
    limit = _ROUNDING * max(map(abs, itertools.chain(values, expected)))
    return all(abs(a - b) <= limit for a, b in zip(values, expected, strict=True))
