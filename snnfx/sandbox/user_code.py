"""Where in the user's code something is recorded."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

import torch
from torch import nn

__all__ = ["format_location", "location_of_error", "location_of_forward", "user_calls", "user_location"]

PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
"""The folder of snnfx."""
_NOT_THE_USERS = (os.path.dirname(torch.__file__) + os.sep, PACKAGE, "<")
CAPTURE_ENTRY = "one_step"
"""Name of the function of ours that calls the user's model: frames outside of it are not the model's."""


def user_location() -> tuple[str, int] | None:
    """File and line of the innermost frame that is neither torch's nor ours, up to the start of the trace."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        filename = code.co_filename
        if code.co_name == CAPTURE_ENTRY and filename.startswith(_NOT_THE_USERS):
            return None
        if not filename.startswith(_NOT_THE_USERS) and "contextlib" not in filename:
            return filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def user_calls() -> tuple[tuple[CodeType, int], ...]:
    """Which call of the user's code this is: code and instruction of each frame of it, the innermost first.

    Two calls on one line are two; the same call in two rounds of a loop is one.
    """
    found: list[tuple[CodeType, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == CAPTURE_ENTRY and code.co_filename.startswith(_NOT_THE_USERS):
            break
        if not code.co_filename.startswith(_NOT_THE_USERS) and "contextlib" not in code.co_filename:
            found.append((code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def location_of_error(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame of the user's code that an exception went through."""
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            found = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return found


def location_of_forward(module: nn.Module, entry: str = "forward") -> str:
    """`Net, net.py:12`: the class of a module and where its step is written, as far as that is the user's."""
    code = getattr(getattr(type(module), entry, None), "__code__", None)
    name = type(module).__name__
    if code is None or code.co_filename.startswith(_NOT_THE_USERS):
        return name
    return f"{name}, {format_location((code.co_filename, code.co_firstlineno))}"


def format_location(where: tuple[str, int] | None) -> str:
    """`file.py:41`, relative to the working directory where that is shorter."""
    if where is None:
        return ""
    relative = os.path.relpath(where[0])
    return f"{relative if not relative.startswith('..') else os.path.basename(where[0])}:{where[1]}"
