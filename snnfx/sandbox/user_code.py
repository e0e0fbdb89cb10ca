"""Source locations in the user's code."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from types import CodeType, FrameType

import torch
from torch import nn

__all__ = [
    "format_location",
    "is_library_code",
    "location_of_error",
    "location_of_forward",
    "step_signature",
    "user_calls",
    "user_location",
]

PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
"""The folder of snnfx."""
_LIBRARY_PREFIXES = (os.path.dirname(torch.__file__) + os.sep, PACKAGE, "<")
CAPTURE_ENTRY = "one_step"
"""Name of the snnfx function that calls the model during capture; outer frames do not belong to the model."""


def is_library_code(code: CodeType) -> bool:
    """Whether code belongs to torch, snnfx or Python's import machinery, not to the model."""
    return code.co_filename.startswith(_LIBRARY_PREFIXES) or "contextlib" in code.co_filename


def user_location() -> tuple[str, int] | None:
    """File and line of the innermost frame of user code within the trace."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        filename = code.co_filename
        if code.co_name == CAPTURE_ENTRY and filename.startswith(_LIBRARY_PREFIXES):
            return None
        if not filename.startswith(_LIBRARY_PREFIXES) and "contextlib" not in filename:
            return filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def user_calls() -> tuple[tuple[CodeType, int], ...]:
    """Identify the current call site: code and instruction of each user frame, innermost first.

    Two calls on one line have two identities; one call in two iterations of a loop has one.
    """
    frames: list[tuple[CodeType, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == CAPTURE_ENTRY and code.co_filename.startswith(_LIBRARY_PREFIXES):
            break
        if not code.co_filename.startswith(_LIBRARY_PREFIXES) and "contextlib" not in code.co_filename:
            frames.append((code, frame.f_lasti))
        frame = frame.f_back
    return tuple(frames)


def location_of_error(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame of user code in the traceback of an exception."""
    location = None
    traceback = error.__traceback__
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_LIBRARY_PREFIXES):
            location = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return location


def location_of_forward(module: nn.Module, entry: str = "forward") -> str:
    """`Net, net.py:12`: the class of a module and, in user code, the location of its `entry` method."""
    code = getattr(getattr(type(module), entry, None), "__code__", None)
    name = type(module).__name__
    if code is None or code.co_filename.startswith(_LIBRARY_PREFIXES):
        return name
    return f"{name}, {format_location((code.co_filename, code.co_firstlineno))}"


def step_signature(model: nn.Module, entry: str) -> inspect.Signature:
    """The signature of the method that computes one step, without `self`; an instance may have its own."""
    return inspect.signature(getattr(model, entry))


def format_location(where: tuple[str, int] | None) -> str:
    """`file.py:41`, relative to the working directory if the file is inside it, else with its folder."""
    if where is None:
        return ""
    return f"{_shown_path(where[0], os.getcwd())}:{where[1]}"


@functools.lru_cache(maxsize=256)
def _shown_path(filename: str, folder: str) -> str:
    """The path relative to `folder`, or its last two parts if outside; cached, as every node asks."""
    relative = os.path.relpath(filename, folder)
    return relative if not relative.startswith("..") else os.path.join(*filename.split(os.sep)[-2:])
