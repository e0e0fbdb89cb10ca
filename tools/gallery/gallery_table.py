"""The tables of the gallery, from its rows as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["HEADER", "compact_line", "compact_table", "line"]

HEADER = (
    "| model | style of | takes | T | conversion, s "
    "| fold, loop, map, once | kernels | verified | inference | training |\n|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Mapping[str, Any]) -> str:
    """One row of the full table."""
    kinds = ", ".join(str(row["regions"][kind]) for kind in ("fold", "loop", "map", "once"))
    kernels = f"{row['kernels']} of {row['regions']['loop']}"
    cells = [row["name"], row["style"], row["takes"], row["T"], f"{row['conversion']:.2f}", kinds, kernels]
    return _cells([*cells, row["verified"], _times(row["inference"]), _times(row["training"])])


def compact_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table of the README."""
    header = "| style of | model | kernels | inference | training |\n|---|---|---|---|---|"
    return "\n".join([header, *(compact_line(row) for row in rows)])


def compact_line(row: Mapping[str, Any]) -> str:
    if not row["regions"]["loop"] and row["verified"] != "yes":
        return _cells([row["style"], row["name"], "refused", "", ""])
    kernels = f"{row['kernels']} of {row['regions']['loop']}"
    return _cells([row["style"], row["name"], kernels, _times(row["inference"]), _times(row["training"])])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}"


def _cells(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
