"""`Drawing`, the result of `snnfx.draw`: DOT text that graphviz renders.

Only rendering (display in a notebook, files other than .dot) needs the Python package graphviz and the program `dot`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snnfx.errors import ToolError, warn_once
from snnfx.inspect.picture.text_lengths import with_text_lengths

__all__ = ["Drawing", "check_file"]

_FORMATS = ("svg", "png", "pdf")


@dataclass(frozen=True)
class Drawing:
    """A picture as DOT text, displayed in notebooks.

    Args:
        source: the DOT text.

    Example:
        >>> import torch, snnfx
        >>> drawing = snnfx.draw(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode()))
        >>> drawing.source.startswith("digraph")
        True
    """

    source: str

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"<snnfx drawing, {len(self.source.splitlines())} lines of DOT>"

    def pipe(self, format: str = "svg") -> bytes:
        """Render with the program `dot`.

        Args:
            format: "svg", "png", "pdf", or "dot" for the DOT text.

        Raises:
            ToolError: SNNFX601, graphviz is missing or fails; SNNFX603, another format.
        """
        if format == "dot":
            return self.source.encode()
        if format not in _FORMATS:
            raise _unknown_format(f"`{format}`")
        _require_graphviz()
        import graphviz

        try:
            source = graphviz.Source(self.source)
            rendered: bytes = source.pipe(format=format)
            if format == "svg":
                rendered = with_text_lengths(rendered.decode(), source.pipe(format="json").decode()).encode()
        except (graphviz.CalledProcessError, graphviz.ExecutableNotFound) as error:
            raise ToolError(
                "SNNFX601",
                f"the program `dot` cannot write {format}",
                why=f"{error}.",
                hint="Install graphviz with support for that format, or write a .dot file and render it elsewhere.",
            ) from error
        return rendered

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the picture to a file in the format of its suffix: .svg, .png, .pdf or .dot.

        Raises:
            ToolError: SNNFX601, graphviz is missing; SNNFX603, another suffix. No file is written then.
        """
        path = check_file(file)
        path.write_bytes(self.pipe(path.suffix.lower().removeprefix(".")))
        return path

    def _repr_svg_(self) -> str | None:
        try:
            return self.pipe("svg").decode()
        except ToolError as error:
            # The notebook then falls back to the text form.
            warn_once(error.code, str(error).removeprefix(f"{error.code} "))
            return None

    _repr_image_svg_xml = _repr_svg_


def check_file(file: str | os.PathLike[str]) -> Path:
    """Check that a picture can be written to a file, and return its path.

    Raises:
        ToolError: SNNFX603, the suffix is not .svg, .png, .pdf or .dot; SNNFX601, graphviz is missing.
    """
    path = Path(file)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix != "dot" and suffix not in _FORMATS:
        raise _unknown_format(f"`{path.name}`")
    if suffix != "dot":
        _require_graphviz()
    return path


def _unknown_format(what: str) -> ToolError:
    known: Sequence[str] = (*_FORMATS, "dot")
    return ToolError(
        "SNNFX603",
        f"cannot draw to {what}",
        why="the suffix of the file selects the format, and this one is not supported.",
        hint=f"Use a supported suffix: {', '.join('.' + name for name in known)}.",
    )


def _require_graphviz() -> None:
    hint = "Install it ({}), or write a .dot file, which needs no graphviz."
    if shutil.which("dot") is None:
        raise ToolError(
            "SNNFX601",
            "the program `dot` is missing",
            why="snnfx renders pictures with graphviz.",
            hint=hint.format("apt install graphviz, brew install graphviz, or https://graphviz.org/download"),
        )
    try:
        import graphviz  # noqa: F401
    except ImportError as error:
        raise ToolError(
            "SNNFX601",
            "the Python package graphviz is missing",
            why="snnfx calls the program `dot` through it.",
            hint=hint.format("pip install graphviz"),
        ) from error
