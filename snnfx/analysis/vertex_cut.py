"""Minimum vertex cut: the cheapest values that separate sources from the values that are needed.

Each value is an edge whose capacity is its cost, so that the cut is a minimum cut of edges (Ford & Fulkerson).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import networkx as nx

__all__ = ["VertexCut"]

V = TypeVar("V", bound=Hashable)

_SOURCE, _SINK = "source", "sink"


class VertexCut(Generic[V]):
    """A graph of values and their operands, to be cut at values.

    Example:
        >>> cut = VertexCut()
        >>> for value, cost in {"x": 4.0, "h": 2.0, "y": 3.0}.items():
        ...     cut.add_value(value, cost)
        >>> cut.add_operand("h", "x")
        >>> cut.add_operand("y", "h")
        >>> cut.add_source("x")
        >>> cut.add_needed("y")
        >>> cut.cheapest()
        {'h'}
    """

    def __init__(self) -> None:
        self._graph = nx.DiGraph()
        self._graph.add_nodes_from((_SOURCE, _SINK))

    def add_value(self, value: V, cost: float) -> None:
        """Add a value; with infinite cost, no cut contains it."""
        self._graph.add_edge((value, "in"), (value, "out"), capacity=cost)

    def add_operand(self, value: V, operand: V) -> None:
        """Compute a value from an operand."""
        self._graph.add_edge((operand, "out"), (value, "in"))

    def add_source(self, value: V) -> None:
        """Mark a value that cannot be computed from other values."""
        self._graph.add_edge(_SOURCE, (value, "in"))

    def add_needed(self, value: V) -> None:
        """Mark a value that must be in the cut or computable from it."""
        self._graph.add_edge((value, "out"), _SINK)

    def cheapest(self) -> set[V] | None:
        """The values of the cheapest cut; None if every cut contains a value of infinite cost."""
        try:
            _, (before, _) = nx.minimum_cut(self._graph, _SOURCE, _SINK)
        except nx.NetworkXUnbounded:
            return None
        sides = before - {_SOURCE}
        return {value for value, side in sides if side == "in" and (value, "out") not in before}
