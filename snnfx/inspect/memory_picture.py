"""Draw allocated bytes over the execution as SVG: one column for each call, stacked by the region that made them.

The SVG is written as text and needs no other package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from snnfx.inspect.memory_phases import PhaseMemory
from snnfx.memory.budget import bytes_as_text
from snnfx.memory.peak_holders import OUTSIDE

__all__ = ["memory_as_svg"]

# Distinguishable with colour-blindness (Okabe & Ito 2008), lightened; greys are for tensors outside of the regions.
_COLORS = ("#3F78AD", "#E08A3C", "#4BA387", "#C8649B", "#D9B640", "#7FB2DD", "#A34A1C", "#6F6BB0")
_REST, _PARAMETERS, _INK, _FAINT, _GRID = "#C4C4BE", "#5C5C58", "#1A1A1A", "#666666", "#E4E4E0"
_BUDGET = "#B3261E"
_FONT = "Helvetica, Arial, sans-serif"
_LEFT, _HEADING, _HEIGHT, _WIDTH, _LEGEND = 84, 84, 200, 640, 300
_MOST_LABELS = 44
_OTHER_REGIONS = "other regions"
_LONGEST_NAME = 28
_ROOM = 120
"""Width in pixels reserved for the label of the peak."""


def memory_as_svg(inference: PhaseMemory, training: PhaseMemory, T: int, budget: int | None) -> str:
    """Draw inference above training, each with its own scale; a region has the same colour in both.

    Args:
        inference: memory of an inference call.
        training: memory of a training step.
        T: number of time steps of the call.
        budget: `memory_budget` in bytes, drawn as a line; None without one.
    """
    phases = (inference, training)
    colors = _colors(phases)
    width, height = _LEFT + _WIDTH + _LEGEND, 0
    parts: list[str] = []
    for phase in phases:
        if phase.moments:
            parts += _panel(phase, T, budget, height + _HEADING, colors)
            height += _HEADING + _HEIGHT + _depth_of_names(phase)
        else:
            parts.append(
                _text(_LEFT, height + 32, f"{phase.phase.capitalize()}: no prediction", size=14, weight="bold")
            )
            height += 48
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="{_FONT}" font-size="11" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _colors(phases: Sequence[PhaseMemory]) -> dict[str, str]:
    """A colour for each region with the largest share of a peak at any moment; the remaining regions share a grey."""
    most: dict[str, float] = {}
    for phase in phases:
        for _, _, allocated in phase.moments:
            for name, count in allocated.items():
                most[name] = max(most.get(name, 0.0), count / max(phase.peak, 1))
    is_outside = most.pop(OUTSIDE, None) is not None
    largest = sorted(most, key=lambda name: -most[name])[: len(_COLORS)]
    # In execution order.
    colors = dict(zip((name for name in most if name in largest), _COLORS, strict=False))
    return {**colors, OUTSIDE: _PARAMETERS} if is_outside else colors


def _named_columns(phase: PhaseMemory) -> range:
    return range(0, len(phase.moments), -(-len(phase.moments) // _MOST_LABELS))


def _depth_of_names(phase: PhaseMemory) -> int:
    """Height in pixels of the rotated column names below the axis."""
    longest = max(len(_shortened(phase.moments[column][0])) for column in _named_columns(phase))
    return 34 + 4 * longest


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _panel(phase: PhaseMemory, T: int, budget: int | None, top: int, colors: Mapping[str, str]) -> list[str]:
    totals = [sum(allocated.values()) for _, _, allocated in phase.moments]
    highest = max([phase.peak, *([budget] if budget and budget < 2 * phase.peak else [])])
    unit, ticks = _ticks(highest)
    bottom, scale = top + _HEIGHT, _HEIGHT / ticks[-1]
    names = {name for _, _, allocated in phase.moments for name in allocated}
    shown = [name for name in colors if name in names]
    step = _WIDTH / len(phase.moments)
    steps = f"chunks of {phase.steps} of {T} time steps" if phase.steps < T else f"{T} time steps"
    parts = [
        _text(_LEFT, top - 52, f"{phase.phase.capitalize()}, {steps}", size=14, weight="bold"),
        _text(
            _LEFT,
            top - 36,
            "memory allocated while each region runs, by the region that made the tensors",
            color=_FAINT,
        ),
    ]
    for tick in ticks:
        y = bottom - tick * scale
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick / unit[1]:g} {unit[0]}", anchor="end", color=_FAINT))
    for column, (name, backward, allocated) in enumerate(phase.moments):
        parts += _column(_LEFT + column * step, step, bottom, scale, allocated, shown, colors)
        if column in _named_columns(phase):
            x = _LEFT + (column + 0.5) * step
            parts.append(_text(x + 3, bottom + 10, _shortened(name), anchor="end", color=_FAINT, size=9, turn=-50))
        if backward and not phase.moments[column - 1][1]:
            x = _LEFT + column * step
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 26}" y2="{bottom}" stroke="{_INK}" '
                'stroke-dasharray="2 3"/>'
            )
            parts.append(_text(x - 6, top - 17, "forward", anchor="end", color=_FAINT))
            parts.append(_text(x + 6, top - 17, "backward", color=_FAINT))
    parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{bottom}" y2="{bottom}" stroke="{_INK}"/>')
    highest_column = max(range(len(totals)), key=totals.__getitem__)
    x, y = _LEFT + (highest_column + 0.5) * step, bottom - totals[highest_column] * scale
    is_left, above = x < _LEFT + _WIDTH / 2, y - 4
    if budget and budget <= ticks[-1]:
        line, label = bottom - budget * scale, f"budget {bytes_as_text(budget)}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{line:.1f}" y2="{line:.1f}" stroke="{_BUDGET}" '
            'stroke-width="1.5"/>'
        )
        # On the side opposite to the peak.
        at, anchor = (_LEFT + _WIDTH - 4, "end") if is_left else (_LEFT + 4, "start")
        parts.append(_text(at, line - 4, label, anchor=anchor, color=_BUDGET, halo=True))
        above = line - 4 if -2 < y - line < 16 else above
    parts.append(f'<path d="M{x:.1f} {y - 2:.1f} l-4 -7 h8 z" fill="{_INK}"/>')
    side, offset = ("start", 8) if x + _ROOM < _LEFT + _WIDTH else ("end", -8)
    parts.append(_text(x + offset, above, f"peak {bytes_as_text(phase.peak)}", anchor=side, weight="bold", halo=True))
    return [*parts, *_legend(phase, shown, colors, highest_column, top)]


def _column(
    x: float,
    width: float,
    bottom: float,
    scale: float,
    allocated: Mapping[str, int],
    shown: list[str],
    colors: Mapping[str, str],
) -> list[str]:
    parts = []
    rest = sum(count for name, count in allocated.items() if name not in colors)
    level, gap = bottom, min(0.5, width / 20)
    for name, count in [*((name, allocated.get(name, 0)) for name in shown), (_OTHER_REGIONS, rest)]:
        height = count * scale
        if height < 0.05:
            continue
        level -= height
        tooltip = escape(f"{name}: {bytes_as_text(count)}")
        parts.append(
            f'<rect x="{x + gap:.2f}" y="{level:.2f}" width="{width - 2 * gap:.2f}" height="{height:.2f}" '
            f'fill="{colors.get(name, _REST)}"><title>{tooltip}</title></rect>'
        )
    return parts


def _legend(phase: PhaseMemory, shown: list[str], colors: Mapping[str, str], column: int, top: int) -> list[str]:
    allocated = phase.moments[column][2]
    rest = sum(count for name, count in allocated.items() if name not in colors)
    x = _LEFT + _WIDTH + 24
    parts = [_text(x, top + 4, "allocated at the peak, by region", color=_FAINT)]
    rows = [*((name, allocated.get(name, 0)) for name in reversed(shown))]
    for row, (name, count) in enumerate([(_OTHER_REGIONS, rest), *rows] if rest else rows):
        y = top + 22 + row * 19
        parts.append(f'<rect x="{x}" y="{y - 9}" width="11" height="11" fill="{colors.get(name, _REST)}"/>')
        parts.append(_text(x + 18, y, _shortened(name)))
        parts.append(_text(x + 260, y, bytes_as_text(count) if count else "0", anchor="end"))
    return parts


def _ticks(highest: int) -> tuple[tuple[str, int], Sequence[int]]:
    """The unit of the axis, and its round multiples from 0 to the first one of at least `highest` bytes."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
    unit = next(unit for unit in units if highest >= unit[1] or unit[1] == 1)
    count = highest / unit[1]
    each = next(size for size in (0.25, 0.5, 1, 2, 2.5, 5, 10, 20, 25, 50, 100, 200, 250, 500) if count / size <= 5)
    return unit, [round(each * i * unit[1]) for i in range(int(-(-count // each)) + 1)]


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    color: str = _INK,
    size: int = 11,
    weight: str = "normal",
    turn: int = 0,
    halo: bool = False,
) -> str:
    styled = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    styled += ' paint-order="stroke" stroke="white" stroke-width="3"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}" '
        f'font-weight="{weight}"{styled}>{escape(text)}</text>'
    )
