"""Find out whether the packages that an export needs can be imported."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from snnfx.deploy.refusals import first_line
from snnfx.errors import ExportError

__all__ = ["missing_packages"]


def missing_packages(names: Sequence[str]) -> list[str]:
    """The packages that are not installed.

    Raises:
        ExportError: SNNFX828, an installed one fails when it is imported.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    for name in names:
        if name not in missing:
            try:
                importlib.import_module(name)
            except Exception as error:
                raise ExportError(
                    "SNNFX828",
                    f"the installed package {name} cannot be imported",
                    why=first_line(error),
                    hint=f"Install it again: `pip install --force-reinstall {name}`.",
                ) from error
    return missing
