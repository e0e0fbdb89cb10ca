"""A picture of the bytes alive over the execution: a column for each call, stacked by the region that made them.

SVG, written as text: no other package is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from snnfx.memory.budget import bytes_as_text

if TYPE_CHECKING:
    from snnfx.memory.report import MemoryReport, PhaseMemory

__all__ = ["memory_as_svg"]

# Told apart by people who see colours differently (Okabe & Ito 2008), lightened; grey is for the rest.
_COLORS = ("#3F78AD", "#E08A3C", "#4BA387", "#C8649B", "#D9B640", "#7FB2DD", "#A34A1C", "#6F6BB0")
_REST, _INK, _FAINT, _GRID = "#C4C4BE", "#1A1A1A", "#666666", "#E4E4E0"
_FONT = "Helvetica, Arial, sans-serif"
_LEFT, _TOP, _HEIGHT, _GAP = 84, 72, 200, 120
_WIDTH, _LEGEND = 640, 250
_MOST_LABELS = 44


def memory_as_svg(memory: MemoryReport) -> str:
    """Inference above training, each with its scale."""
    phases = [phase for phase in (memory.inference, memory.training) if phase.moments]
    height = _TOP + len(phases) * (_HEIGHT + _GAP) - 24
    width = _LEFT + _WIDTH + _LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="{_FONT}" font-size="11" fill="{_INK}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, phase in enumerate(phases):
        parts += _panel(phase, memory, _TOP + number * (_HEIGHT + _GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(phase: PhaseMemory, memory: MemoryReport, top: int) -> list[str]:
    totals = [sum(held.values()) for _, _, held in phase.moments]
    highest = max([phase.peak, *([memory.budget] if memory.budget and memory.budget < 2 * phase.peak else [])])
    unit, ticks = _ticks(highest)
    bottom, scale = top + _HEIGHT, _HEIGHT / ticks[-1]
    shown = _shown(phase)
    colors = dict(zip(shown, _COLORS, strict=False))
    step, every = _WIDTH / len(phase.moments), -(-len(phase.moments) // _MOST_LABELS)
    steps = f"{phase.steps} of {memory.T} time steps at once" if phase.steps < memory.T else f"{memory.T} time steps"
    parts = [
        _text(_LEFT, top - 40, f"{phase.phase.capitalize()}, {steps}", size=14, weight="bold"),
        _text(_LEFT, top - 24, "bytes alive while each region runs, by the region that made them", color=_FAINT),
    ]
    for tick in ticks:
        y = bottom - tick * scale
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick / unit[1]:g} {unit[0]}", anchor="end", color=_FAINT))
    for column, (name, backward, held) in enumerate(phase.moments):
        parts += _column(_LEFT + column * step, step, bottom, scale, held, shown, colors)
        if column % every == 0:
            x = _LEFT + (column + 0.5) * step
            parts.append(_text(x + 3, bottom + 10, name, anchor="end", color=_FAINT, size=9, turn=-50))
        if backward and not phase.moments[column - 1][1]:
            x = _LEFT + column * step
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{_INK}" stroke-dasharray="2 3"/>'
            )
            parts.append(_text(x - 6, top - 4, "forward", anchor="end", color=_FAINT))
            parts.append(_text(x + 6, top - 4, "backward", color=_FAINT))
    parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{bottom}" y2="{bottom}" stroke="{_INK}"/>')
    if memory.budget and memory.budget <= ticks[-1]:
        y = bottom - memory.budget * scale
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#B3261E" stroke-width="1.5"/>'
        )
        parts.append(_text(_LEFT + 4, y - 4, f"budget {bytes_as_text(memory.budget)}", color="#B3261E"))
    widest = max(range(len(totals)), key=totals.__getitem__)
    x, y = _LEFT + (widest + 0.5) * step, bottom - totals[widest] * scale
    parts.append(f'<path d="M{x:.1f} {y - 2:.1f} l-4 -7 h8 z" fill="{_INK}"/>')
    # Away from the line between the passes, where their names are, as long as there is room.
    away = phase.moments[widest][1] or not phase.moments[-1][1]
    side, offset = ("start", 8) if away and x + _ROOM < _LEFT + _WIDTH else ("end", -8)
    parts.append(_text(x + offset, y - 4, f"peak {bytes_as_text(phase.peak)}", anchor=side, weight="bold"))
    return [*parts, *_legend(phase, shown, colors, widest, top)]


_ROOM = 120
"""Pixels that the peak's text takes."""


def _shown(phase: PhaseMemory) -> list[str]:
    """The regions that hold most at any time; the others are one colour."""
    most: dict[str, int] = {}
    for _, _, held in phase.moments:
        for name, count in held.items():
            most[name] = max(most.get(name, 0), count)
    largest = sorted(most, key=lambda name: -most[name])[: len(_COLORS)]
    return [name for name in most if name in largest]


def _column(
    x: float,
    width: float,
    bottom: float,
    scale: float,
    held: Mapping[str, int],
    shown: list[str],
    colors: dict[str, str],
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


def _legend(phase: PhaseMemory, shown: list[str], colors: dict[str, str], widest: int, top: int) -> list[str]:
    held = phase.moments[widest][2]
    rest = sum(count for name, count in held.items() if name not in colors)
    x = _LEFT + _WIDTH + 24
    parts = [_text(x, top + 4, "made by, and held at the peak", color=_FAINT)]
    rows = [*((name, held.get(name, 0)) for name in reversed(shown))]
    for row, (name, count) in enumerate([("the others", rest), *rows] if rest else rows):
        y = top + 22 + row * 19
        parts.append(f'<rect x="{x}" y="{y - 9}" width="11" height="11" fill="{colors.get(name, _REST)}"/>')
        parts.append(_text(x + 18, y, name))
        parts.append(_text(x + 200, y, bytes_as_text(count) if count else "", anchor="end"))
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
) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}" '
        f'font-weight="{weight}"{turned}>{escape(text)}</text>'
    )
