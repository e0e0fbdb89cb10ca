"""Charts of the profile page, as SVG text without colours of their own: the style sheet sets them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from snnfx.inspect.memory_phases import PhaseMemory
from snnfx.inspect.profile_data import FiringRate, Recording
from snnfx.memory.budget import bytes_as_text

__all__ = ["channel_strip", "memory_chart", "potential_chart", "rate_line", "spike_raster"]

_MOST_CELLS = 96
_MOST_LINES = 5
_WIDTH = 640


def channel_strip(row: FiringRate) -> str:
    """The rates of the channels as a strip of cells; neighbours share a cell if there are many."""
    count = len(row.channels)
    cells = min(count, _MOST_CELLS)
    highest = max(row.channels) or 1.0
    parts = []
    for cell in range(cells):
        first, last = cell * count // cells, (cell + 1) * count // cells
        rate = sum(row.channels[first:last]) / (last - first)
        which = f"channel {first}" if last - first == 1 else f"channels {first} to {last - 1}"
        opacity = f"{0.15 + 0.85 * rate / highest:.2f}" if rate else "0"
        parts.append(
            f'<rect x="{cell}" y="0" width="1" height="1" fill="var(--spike)" fill-opacity="{opacity}">'
            f"<title>{which}: {rate:.4f}</title></rect>"
        )
    label = f"rates of {count} channels, highest {highest:.4f}"
    return (
        f'<svg class="strip" viewBox="0 0 {cells} 1" preserveAspectRatio="none" role="img" aria-label="{label}" '
        f'shape-rendering="crispEdges">{"".join(parts)}</svg>'
    )


def rate_line(values: Sequence[float]) -> str:
    """A rate over time as a small line, from 0 to its highest value."""
    highest = max(values, default=0.0) or 1.0
    steps = _thinned(values, 200)
    width = max(len(steps) - 1, 1)
    points = [(i / width * 100, 24 - value / highest * 20) for i, value in enumerate(steps)]
    if len(points) == 1:
        points.append((100.0, points[0][1]))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<svg class="spark" viewBox="0 0 100 26" preserveAspectRatio="none" role="img" '
        f'aria-label="rate over time, highest {highest:.4f}">'
        f'<polygon points="0,25 {line} 100,25" fill="var(--spike)" fill-opacity=".16"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--spike)" stroke-width="1.5" '
        'vector-effect="non-scaling-stroke"/></svg>'
    )


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """At most this many values; neighbours are averaged."""
    count = min(len(values), most)
    bounds = [i * len(values) // count for i in range(count + 1)] if count else [0]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]


def memory_chart(memory: PhaseMemory, kinds: dict[str, str]) -> str:
    """Allocated bytes while each region runs, forward and then backward, with the peak marked."""
    totals = [(name, backward, sum(parts.values())) for name, backward, parts in memory.moments]
    if not totals:
        return ""
    top, height, highest = 26, 150, max(total for *_, total in totals) or 1
    step = _WIDTH / len(totals)
    gap = min(3.0, step / 6)
    parts = [
        f'<line x1="0" x2="{_WIDTH}" y1="{top + height}" y2="{top + height}" stroke="var(--line)"/>',
        f'<line x1="0" x2="{_WIDTH}" y1="{top}" y2="{top}" stroke="var(--line)" stroke-dasharray="3 3"/>',
    ]
    for i, (name, backward, total) in enumerate(totals):
        size = total / highest * height
        color = f"var(--{kinds.get(name) or 'none'})"
        title = f"{name}{', backward' if backward else ''}: {bytes_as_text(total)}"
        parts.append(
            f'<rect data-region="{escape(name)}" x="{i * step + gap / 2:.2f}" y="{top + height - size:.2f}" '
            f'width="{max(step - gap, 0.5):.2f}" height="{size:.2f}" rx="{min(2.0, step / 6):.1f}" fill="{color}"'
            f"{' fill-opacity=' + chr(34) + '.55' + chr(34) if backward else ''}><title>{escape(title)}</title></rect>"
        )
    at = max(range(len(totals)), key=lambda i: totals[i][2])
    x = (at + 0.5) * step
    side, shift = ("end", -8) if x > _WIDTH / 2 else ("start", 8)
    parts.append(f'<path d="M{x:.1f} {top - 3} l-5 -8 h10 z" fill="var(--ink)"/>')
    parts.append(
        f'<text x="{x + shift:.1f}" y="{top - 6}" text-anchor="{side}" style="fill:var(--ink);font-size:13px;'
        f'font-weight:600">peak {bytes_as_text(memory.peak)}</text>'
    )
    first = next((i for i, (_, backward, _) in enumerate(totals) if backward), None)
    parts.append(f'<text x="0" y="{top + height + 18}" style="font-size:12px">forward</text>')
    if first is not None:
        parts.append(f'<text x="{first * step:.1f}" y="{top + height + 18}" style="font-size:12px">backward</text>')
    label = f"memory over the call, peak {bytes_as_text(memory.peak)}"
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {top + height + 24}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def spike_raster(recording: Recording) -> str:
    """One mark for each spike: time to the right, units downwards."""
    steps, units = len(recording.values), len(recording.values[0]) if recording.values else 0
    left, row = 34, max(min(6.0, 220 / max(units, 1)), 2.5)
    step = (_WIDTH - left) / max(steps, 1)
    width, height = max(min(step * 0.7, 5.0), 0.8), units * row
    marks = "".join(
        f"M{left + (t + 0.5) * step - width / 2:.1f} {u * row + 0.5:.1f}h{width:.1f}v{row - 1:.1f}h-{width:.1f}z"
        for t, values in enumerate(recording.values)
        for u, value in enumerate(values)
        if value
    )
    spikes = sum(1 for values in recording.values for value in values if value)
    label = f"{spikes} spikes of {units} units in {steps} time steps"
    axis = _time_axis(left, height, steps)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height + 22:.0f}" role="img" aria-label="{label}">'
        f'<rect x="{left}" y="0" width="{_WIDTH - left}" height="{height:.1f}" fill="var(--track)" rx="3"/>'
        f'<path d="{marks or "M0 0"}" fill="var(--spike)"/>'
        f'<text x="{left - 6}" y="10" text-anchor="end">0</text>'
        f'<text x="{left - 6}" y="{height:.1f}" text-anchor="end">{units - 1}</text>{axis}</svg>'
    )


def potential_chart(recording: Recording) -> str:
    """Values over time as lines, of up to five units."""
    steps, units = len(recording.values), len(recording.values[0]) if recording.values else 0
    shown = sorted(
        {round(i * (units - 1) / max(min(units, _MOST_LINES) - 1, 1)) for i in range(min(units, _MOST_LINES))}
    )
    values = [[recording.values[t][u] for t in range(steps)] for u in shown]
    flat = [v for line in values for v in line]
    low, high = min(flat, default=0.0), max(flat, default=1.0)
    span, left, height = (high - low) or 1.0, 34, 140
    width = max(steps - 1, 1)
    colors = ("loop", "fold", "map", "good", "none")
    lines = "".join(
        '<polyline points="'
        + " ".join(
            f"{left + t / width * (_WIDTH - left):.1f},{height - 6 - (v - low) / span * (height - 12):.1f}"
            for t, v in enumerate(line)
        )
        + f'" fill="none" stroke="var(--{colors[i]})" stroke-width="1.6"><title>unit {shown[i]}</title></polyline>'
        for i, line in enumerate(values)
    )
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height + 22}" role="img" '
        f'aria-label="values of {len(shown)} units in {steps} time steps, from {low:.3g} to {high:.3g}">'
        f'<rect x="{left}" y="0" width="{_WIDTH - left}" height="{height}" fill="var(--track)" rx="3"/>{lines}'
        f'<text x="{left - 6}" y="12" text-anchor="end">{high:.2g}</text>'
        f'<text x="{left - 6}" y="{height - 2}" text-anchor="end">{low:.2g}</text>'
        f"{_time_axis(left, height, steps)}</svg>"
    )


def _time_axis(left: float, height: float, steps: int) -> str:
    y = height + 15
    return (
        f'<text x="{left}" y="{y:.1f}">t = 0</text><text x="{_WIDTH}" y="{y:.1f}" text-anchor="end">{steps - 1}</text>'
    )
