"""Fix text widths in SVG files, so that they do not depend on the viewer's fonts.

graphviz positions pieces of text by their widths in its own font. In a viewer with a wider font they would overlap.
With the attribute `textLength` the viewer fits each piece into the width that graphviz reserved.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["with_text_lengths"]

_TEXT = re.compile(r"<text ([^>]*)>([^<]*)</text>")
_SIZE = re.compile(r'font-size="([\d.]+)"')
_BOLD = 1
"""Bit of xdot's font characteristics."""

Key = tuple[str, float, bool]


def with_text_lengths(svg: str, layout: str) -> str:
    """Add the length of each piece of text to an SVG of graphviz.

    Args:
        svg: output of `dot -Tsvg`.
        layout: output of `dot -Tjson` for the same picture.

    Source: https://graphviz.org/docs/outputs/canon/#xdot, operations F, t and T; SVG 1.1, attribute textLength.
    """
    widths = dict(_widths(json.loads(layout)))

    def fitted(match: re.Match[str]) -> str:
        attributes, text = match.groups()
        size = _SIZE.search(attributes)
        key = (html.unescape(text), float(size.group(1)) if size else 0.0, 'font-weight="bold"' in attributes)
        width = widths.get(key)
        if width is None or not text.strip():
            return match.group(0)
        return f'<text textLength="{width:.2f}" lengthAdjust="spacingAndGlyphs" {attributes}>{text}</text>'

    return _TEXT.sub(fitted, svg)


def _widths(layout: dict[str, Any]) -> Iterator[tuple[Key, float]]:
    """The width in points of each text with its font size and weight."""
    for item in (layout, *layout.get("objects", ()), *layout.get("edges", ())):
        for drawn in ("_draw_", "_ldraw_", "_hldraw_", "_tldraw_"):
            size, bold = 0.0, False
            for operation in item.get(drawn, ()):
                if operation["op"] == "F":
                    size = float(operation["size"])
                elif operation["op"] == "t":
                    bold = bool(operation["fontchar"] & _BOLD)
                elif operation["op"] == "T":
                    yield (operation["text"], size, bold), float(operation["width"])
