"""What `snnfx.draw` returns: a picture as DOT text, rendered by graphviz when it is shown or written to a file.

The text is made without graphviz; the Python package and the program `dot` are needed for rendering alone.
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
    """A picture as DOT text; shows itself in notebooks.

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
            format: "svg", "png" or "pdf"; "dot" gives the text itself.

        Raises:
            ToolError: graphviz is missing or fails (SNNFX601), or another format (SNNFX603).
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
                hint="Install a complete graphviz, or draw to a .dot file and render it elsewhere.",
            ) from error
        return rendered

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the picture to a file; its suffix (.svg, .png, .pdf, .dot) says how.

        Raises:
            ToolError: SNNFX601, SNNFX603; nothing has been written then.
        """
        path = check_file(file)
        path.write_bytes(self.pipe(path.suffix.lower().removeprefix(".")))
        return path

    def _repr_svg_(self) -> str | None:
        try:
            return self.pipe("svg").decode()
        except ToolError as error:
            # A notebook then shows the text form.
            warn_once(error.code, str(error).removeprefix(f"{error.code} "))
            return None

    _repr_image_svg_xml = _repr_svg_


def check_file(file: str | os.PathLike[str]) -> Path:
    """The path, after checking that a picture can be written to it.

    Raises:
        ToolError: the suffix is none of .svg, .png, .pdf, .dot (SNNFX603), or graphviz is missing for it (SNNFX601).
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
        why="the type of a picture is the suffix of its file.",
        hint=f"Use one of {', '.join('.' + name for name in known)}.",
    )


def _require_graphviz() -> None:
    hint = "Install it ({}), or draw to a .dot file, which needs neither."
    if shutil.which("dot") is None:
        raise ToolError(
            "SNNFX601",
            "the program `dot` is missing",
            why="graphviz draws the pictures.",
            hint=hint.format("apt install graphviz, brew install graphviz, or https://graphviz.org/download"),
        )
    try:
        import graphviz  # noqa: F401
    except ImportError as error:
        raise ToolError(
            "SNNFX601",
            "the Python package graphviz is missing",
            why="it calls the program `dot`.",
            hint=hint.format('pip install "snnfx[draw]"'),
        ) from error
