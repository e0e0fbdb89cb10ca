"""Compare benchmark results with earlier ones: the time of snnfx relative to the other sides of the same run.

Milliseconds depend on the machine and its load. Ratios to a peer or a lower bound measured in the same run depend less
on them. A row has several such ratios; the median of their changes counts, so that one disturbed peer decides nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Change", "changes", "committed", "report"]

OURS = "snnfx"


@dataclass(frozen=True)
class Change:
    """A row of a benchmark, before and now.

    Args:
        row: the case, its malloc settings and the kind of call.
        change: factor of the time relative to the references; above 1 is slower. None: no earlier figure.
        ratios: by reference, the time of snnfx divided by that of the reference, before and now.
    """

    row: str
    change: float | None
    ratios: dict[str, tuple[float, float]]


def changes(before: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]) -> list[Change]:
    """A `Change` for each row of the new results."""
    earlier = {_key(result): result for result in before}
    found: list[Change] = []
    for result in now:
        old = earlier.get(_key(result), {})
        for kind, times in result.items():
            if isinstance(times, dict) and OURS in times:
                ratios = _ratios(old.get(kind, {}), times)
                change = statistics.median(new / past for past, new in ratios.values()) if ratios else None
                found.append(Change(f"{_key(result)}, {kind}", change, ratios))
    return found


def committed(folder: Path, suite: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The machine and the results in the committed file of a suite; None if there is no file."""
    path = folder / f"{suite}_cpu.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content["machine"], content["cases"]


def report(found: list[Change], percent: float) -> tuple[str, bool]:
    """A text that lists the rows that became slower by more than a percentage, and whether there are any."""
    compared = [change for change in found if change.change is not None]
    slower = [c for c in compared if c.change is not None and c.change > 1 + percent / 100]
    lines = [f"  {len(slower)} of {len(compared)} rows are more than {percent:g} % slower than the committed figures"]
    for change in sorted(slower, key=lambda c: -(c.change or 0)):
        assert change.change is not None
        ratios = ", ".join(f"{name} {old:.2f} -> {new:.2f}" for name, (old, new) in change.ratios.items())
        lines.append(f"    {(change.change - 1) * 100:+6.1f} %  {change.row}   (time / {ratios})")
    absent = len(found) - len(compared)
    if absent:
        lines.append(f"  {absent} rows have no committed figure")
    return "\n".join(lines), bool(slower)


def _key(result: dict[str, Any]) -> str:
    case = ", ".join(f"{name}={value}" for name, value in result["case"].items() if value is not False)
    return f"{case}, {result.get('malloc', 'default')} malloc settings"


def _ratios(before: dict[str, float], now: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Ratios to each reference that both runs have; parts of snnfx itself are no references."""
    shared = [name for name in now if name in before and name not in (OURS, "kernels alone")]
    return {name: (before[OURS] / before[name], now[OURS] / now[name]) for name in shared if OURS in before}
