"""Documents made of titles, paragraphs, tables and lists, printed as terminal text or Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NO_BREAK", "WIDTH", "Bullets", "Document", "Paragraph", "Table", "Title", "as_markdown", "as_text"]

WIDTH = 100
"""Width of a line of text in columns."""
NO_BREAK = "\N{NO-BREAK SPACE}"
"""A space that prevents a line break; the output has an ordinary space instead."""
_GAP = "  "
_NARROWEST = 24


@dataclass(frozen=True)
class Title:
    """A heading; level 1 is the title of the document."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, wrapped to the width of the document."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A bulleted list; further lines of an item are printed below it."""

    items: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """A table; empty columns are dropped and the widest column is wrapped.

    Args:
        header: the title of each column.
        rows: the cells of each row.
        code: indices of the columns with names and shapes, formatted as code in Markdown.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    code: frozenset[int] = frozenset()

    def used(self) -> list[int]:
        """Indices of the columns with any content."""
        return [i for i in range(len(self.header)) if any(row[i] for row in self.rows)]


Document = Sequence[Title | Paragraph | Bullets | Table]


def as_text(document: Document, width: int = WIDTH) -> str:
    """Print a document for a terminal: aligned, at most `width` columns wide, without colours."""
    parts: list[str] = []
    heading: Title | None = None
    for block in document:
        # The paragraph below a heading is indented.
        is_below_heading = heading is not None
        heading = block if isinstance(block, Title) and block.level > 1 else None
        if isinstance(block, Title):
            underline = f"\n{'=' * len(block.text)}" if block.level == 1 else ""
            parts.append(block.text + underline)
        elif isinstance(block, Paragraph):
            indent = _GAP if is_below_heading else ""
            parts.append(_wrapped(block.text, width, indent, indent))
        elif isinstance(block, Bullets):
            parts.append("\n".join(_bullet(item, width) for item in block.items))
        else:
            parts.append(_table(block, width))
    text = ""
    for block, part in zip(document, parts, strict=True):
        text += part + ("\n" if isinstance(block, Title) and block.level > 1 else "\n\n")
    return text.rstrip("\n").replace(NO_BREAK, " ")


def as_markdown(document: Document) -> str:
    """Print a document as GitHub-flavoured Markdown."""
    parts: list[str] = []
    for block in document:
        if isinstance(block, Title):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Paragraph):
            parts.append(block.text)
        elif isinstance(block, Bullets):
            parts.append("\n".join("- " + "  \n  ".join(item) for item in block.items))
        else:
            parts.append(_markdown_table(block))
    return "\n\n".join(parts).replace(NO_BREAK, " ") + "\n"


def _wrapped(text: str, width: int, first: str = "", later: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=True, break_on_hyphens=False
    )


def _bullet(item: Sequence[str], width: int) -> str:
    lines = [_wrapped(item[0], width, "  - ", "    ")]
    lines += [_wrapped(line, width, "    ", "    ") for line in item[1:]]
    return "\n".join(lines)


def _table(table: Table, width: int) -> str:
    columns = table.used()
    header = [table.header[i] for i in columns]
    rows = [[row[i] for i in columns] for row in table.rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(columns))]
    room = width - len(_GAP) * len(columns)
    while sum(widths) > room:
        widest = max(range(len(widths)), key=widths.__getitem__)
        others = sorted(widths)[-2] if len(widths) > 1 else 0
        narrower = max(room - (sum(widths) - widths[widest]), others, _NARROWEST)
        widths[widest] = narrower if narrower < widths[widest] else widths[widest] - 1
    lines = _table_row(header, widths) + _table_row(["-" * w for w in widths], widths)
    for row in rows:
        lines += _table_row(row, widths)
    return "\n".join(lines)


def _table_row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    wrapped = [
        textwrap.wrap(cell, w, subsequent_indent="  ", break_on_hyphens=False) or [""]
        for cell, w in zip(cells, widths, strict=True)
    ]
    height = max(len(cell) for cell in wrapped)
    lines = []
    for i in range(height):
        line = _GAP.join((cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(wrapped, widths, strict=True))
        lines.append((_GAP + line).rstrip())
    return lines


def _markdown_table(table: Table) -> str:
    columns = table.used()
    rows = [[_cell(row[i], i in table.code) for i in columns] for row in table.rows]
    lines = [[table.header[i] for i in columns], ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str, code: bool) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"`{text}`" if code and text and "`" not in text else text
