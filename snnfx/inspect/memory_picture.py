"""A picture of the bytes alive over the execution: a column for each call, stacked by the region that made them.

SVG, written as text: no other package is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from snnfx.memory.budget import bytes_as_text
from snnfx.memory.peak_holders import OUTSIDE

if TYPE_CHECKING:
    from snnfx.inspect.memory_report import MemoryReport, PhaseMemory

__all__ = ["memory_as_svg"]

# Told apart by people who see colours differently (Okabe & Ito 2008), lightened; greys are for what is no region's.
_COLORS = ("#3F78AD", "#E08A3C", "#4BA387", "#C8649B", "#D9B640", "#7FB2DD", "#A34A1C", "#6F6BB0")
_REST, _PARAMETERS, _INK, _FAINT, _GRID = "#C4C4BE", "#5C5C58", "#1A1A1A", "#666666", "#E4E4E0"
_BUDGET = "#B3261E"
_FONT = "Helvetica, Arial, sans-serif"
_LEFT, _HEADING, _HEIGHT, _WIDTH, _LEGEND = 84, 84, 200, 640, 300
_MOST_LABELS = 44
_LONGEST_NAME = 28
_ROOM = 120
"""Pixels that the peak's text takes."""


def memory_as_svg(memory: MemoryReport) -> str:
    """Inference above training, each with its scale; a region has one colour in both."""
    colors = _colors(memory)
    width, height = _LEFT + _WIDTH + _LEGEND, 0
    parts: list[str] = []
    for phase in (memory.inference, memory.training):
        if phase.moments:
            parts += _panel(phase, memory, height + _HEADING, colors)
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


def _colors(memory: MemoryReport) -> dict[str, str]:
    """The colours of those that hold the largest part of a peak at any time; the others are one colour."""
    most: dict[str, float] = {}
    for phase in (memory.inference, memory.training):
        for _, _, held in phase.moments:
            for name, count in held.items():
                most[name] = max(most.get(name, 0.0), count / max(phase.peak, 1))
    is_outside = most.pop(OUTSIDE, None) is not None
    largest = sorted(most, key=lambda name: -most[name])[: len(_COLORS)]
    # In the order in which they run.
    colors = dict(zip((name for name in most if name in largest), _COLORS, strict=False))
    return {**colors, OUTSIDE: _PARAMETERS} if is_outside else colors


def _named_columns(phase: PhaseMemory) -> range:
    return range(0, len(phase.moments), -(-len(phase.moments) // _MOST_LABELS))


def _depth_of_names(phase: PhaseMemory) -> int:
    """Pixels under the axis that the styled names of the columns take."""
    longest = max(len(_shortened(phase.moments[column][0])) for column in _named_columns(phase))
    return 34 + 4 * longest


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _panel(phase: PhaseMemory, memory: MemoryReport, top: int, colors: Mapping[str, str]) -> list[str]:
    totals = [sum(held.values()) for _, _, held in phase.moments]
    highest = max([phase.peak, *([memory.budget] if memory.budget and memory.budget < 2 * phase.peak else [])])
    unit, ticks = _ticks(highest)
    bottom, scale = top + _HEIGHT, _HEIGHT / ticks[-1]
    held_here = {name for _, _, held in phase.moments for name in held}
    shown = [name for name in colors if name in held_here]
    step = _WIDTH / len(phase.moments)
    steps = f"{phase.steps} of {memory.T} time steps at once" if phase.steps < memory.T else f"{memory.T} time steps"
    parts = [
        _text(_LEFT, top - 52, f"{phase.phase.capitalize()}, {steps}", size=14, weight="bold"),
        _text(_LEFT, top - 36, "bytes alive while each region runs, by the region that made them", color=_FAINT),
    ]
    for tick in ticks:
        y = bottom - tick * scale
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick / unit[1]:g} {unit[0]}", anchor="end", color=_FAINT))
    for column, (name, backward, held) in enumerate(phase.moments):
        parts += _column(_LEFT + column * step, step, bottom, scale, held, shown, colors)
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
    widest = max(range(len(totals)), key=totals.__getitem__)
    x, y = _LEFT + (widest + 0.5) * step, bottom - totals[widest] * scale
    is_left, above = x < _LEFT + _WIDTH / 2, y - 4
    if memory.budget and memory.budget <= ticks[-1]:
        line, told = bottom - memory.budget * scale, f"budget {bytes_as_text(memory.budget)}"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{line:.1f}" y2="{line:.1f}" stroke="{_BUDGET}" '
            'stroke-width="1.5"/>'
        )
        # On the other side than the peak.
        at, anchor = (_LEFT + _WIDTH - 4, "end") if is_left else (_LEFT + 4, "start")
        parts.append(_text(at, line - 4, told, anchor=anchor, color=_BUDGET, halo=True))
        above = line - 4 if -2 < y - line < 16 else above
    parts.append(f'<path d="M{x:.1f} {y - 2:.1f} l-4 -7 h8 z" fill="{_INK}"/>')
    side, offset = ("start", 8) if x + _ROOM < _LEFT + _WIDTH else ("end", -8)
    parts.append(_text(x + offset, above, f"peak {bytes_as_text(phase.peak)}", anchor=side, weight="bold", halo=True))
    return [*parts, *_legend(phase, shown, colors, widest, top)]


def _column(
    x: float,
    width: float,
    bottom: float,
    scale: float,
    held: Mapping[str, int],
    shown: list[str],
    colors: Mapping[str, str],
) -> list[str]:
    parts = []
    rest = sum(count for name, count in held.items() if name not in colors)
    level, gap = bottom, min(0.5, width / 20)
    for name, count in [*((name, held.get(name, 0)) for name in shown), ("the others", rest)]:
        height = count * scale
        if height < 0.05:
            continue
        level -= height
        told = escape(f"{name}: {bytes_as_text(count)}")
        parts.append(
            f'<rect x="{x + gap:.2f}" y="{level:.2f}" width="{width - 2 * gap:.2f}" height="{height:.2f}" '
            f'fill="{colors.get(name, _REST)}"><title>{told}</title></rect>'
        )
    return parts


def _legend(phase: PhaseMemory, shown: list[str], colors: Mapping[str, str], widest: int, top: int) -> list[str]:
    held = phase.moments[widest][2]
    rest = sum(count for name, count in held.items() if name not in colors)
    x = _LEFT + _WIDTH + 24
    parts = [_text(x, top + 4, "made by, and held at the peak", color=_FAINT)]
    rows = [*((name, held.get(name, 0)) for name in reversed(shown))]
    for row, (name, count) in enumerate([("the others", rest), *rows] if rest else rows):
        y = top + 22 + row * 19
        parts.append(f'<rect x="{x}" y="{y - 9}" width="11" height="11" fill="{colors.get(name, _REST)}"/>')
        parts.append(_text(x + 18, y, _shortened(name)))
        parts.append(_text(x + 260, y, bytes_as_text(count) if count else "0", anchor="end"))
    return parts


def _ticks(highest: int) -> tuple[tuple[str, int], Sequence[int]]:
    """The unit and its round multiples from 0 up to the first one that is not below the highest bytes."""
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
