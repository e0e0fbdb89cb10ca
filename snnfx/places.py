"""Where in the user's code something is recorded."""

from __future__ import annotations

import os
import sys

import torch

__all__ = ["format_place", "user_place"]

_NOT_THE_USERS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<")
START_OF_TRACE = "one_step"
"""Name of the function of ours that calls the user's model: frames outside of it are not the model's."""


def user_place() -> tuple[str, int] | None:
    """File and line of the innermost frame that is neither torch's nor ours, up to the start of the trace."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        filename = code.co_filename
        if code.co_name == START_OF_TRACE and filename.startswith(_NOT_THE_USERS):
            return None
        if not filename.startswith(_NOT_THE_USERS) and "contextlib" not in filename:
            return filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def format_place(where: tuple[str, int] | None) -> str:
    """`file.py:41`, relative to the working directory where that is shorter."""
    if where is None:
        return ""
    relative = os.path.relpath(where[0])
    return f"{relative if not relative.startswith('..') else os.path.basename(where[0])}:{where[1]}"
