"""`ProfileReport`, what `snnfx.profile` returns."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snnfx.errors import ToolError
from snnfx.inspect.document import as_markdown, as_text
from snnfx.inspect.plain_data import plain_data
from snnfx.inspect.profile.profile_document import profile_document
from snnfx.inspect.profile.profile_page import profile_page
from snnfx.inspect.profile_data import ProfileData

__all__ = ["ProfileReport", "check_report_file"]


@dataclass(frozen=True, repr=False)
class ProfileReport(ProfileData):
    """A measured call of a net, printed, saved as a page or read as data; see `snnfx.profile`."""

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, ready for `json.dumps`; without the picture.

        Units: milliseconds, bytes, joules (keys `energy` and `dense_energy`), spikes per neuron and time step.
        """
        data = plain_data(dataclasses.replace(self, picture=""))
        del data["picture"]
        totals = ("dense_macs", "macs", "acs", "energy", "dense_energy", "rate")
        return {**data, **{name: getattr(self, name) for name in totals}}

    def to_markdown(self) -> str:
        """The report as GitHub-flavoured Markdown."""
        return as_markdown(profile_document(self))

    def to_html(self) -> str:
        """The report as one HTML page that loads no other file."""
        return profile_page(self)

    def __str__(self) -> str:
        return as_text(profile_document(self))

    __repr__ = __str__

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the report to a file: .html (one page that loads no other file), .md or .json.

        Raises:
            ToolError: SNNFX603, another suffix.
        """
        path = check_report_file(file)
        suffix = path.suffix.lower()
        if suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2)
        else:
            text = self.to_markdown() if suffix == ".md" else self.to_html()
        path.write_text(text, encoding="utf-8")
        return path

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def check_report_file(file: str | os.PathLike[str]) -> Path:
    """Check that a report can be written to a file of this suffix, and return its path.

    Raises:
        ToolError: SNNFX603, the suffix is not .html, .md or .json.
    """
    path = Path(file)
    if path.suffix.lower() not in (".html", ".md", ".json"):
        raise ToolError(
            "SNNFX603",
            f"cannot write a profile to `{path.name}`",
            why="the suffix of the file selects the format, and this one is not supported.",
            hint="Use the suffix .html, .md or .json.",
        )
    return path
