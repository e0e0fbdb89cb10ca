"""Errors and warnings of snnfx, each with a stable code.

A message names the problem, the location (qualified name and the user's file:line), the cause, and a remedy:

    SNNFX602 calling `models.csnn:build` failed (models/csnn.py:41): ValueError: the width must be positive.
    Correct the code there, or pass another factory.

Groups of codes: 1xx a node is not folded (reported by `explain`, never raised), 2xx capture, 3xx arguments of a call,
4xx verification, 5xx passes and running a net, 6xx command line and pictures, 61x online training, 70x passes of the
user's own, 80x and 81x export, 82x save and load.
`python -m snnfx explain --code SNNFX103` prints the meaning of a code with an example.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from dataclasses import dataclass

import torch

from snnfx._codes import CODES, CodeEntry

__all__ = [
    "CODES",
    "AllocationError",
    "CaptureError",
    "CodeEntry",
    "ExportError",
    "InputError",
    "PassError",
    "Refusal",
    "SaveError",
    "SnnfxError",
    "SnnfxWarning",
    "ToolError",
    "VerificationError",
    "describe_code",
    "warn",
    "warn_once",
]


class SnnfxError(Exception):
    """Base class of all errors of snnfx.

    Args:
        code: stable code, a key of `CODES`, e.g. ``"SNNFX201"``.
        what: the problem, as a clause without a final period.
        where: qualified name and file:line, or "" if unknown.
        why: the cause, as a sentence.
        hint: the remedy, as a sentence.
    """

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not a registered error code (snnfx/_codes.py)")
        self.code, self.what, self.where, self.why, self.hint = code, what, where, why, hint
        super().__init__(format_message(code, what, where, why, hint))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_error, (type(self), self.code, self.what, self.where, self.why, self.hint))


def _rebuild_error(cls: type[SnnfxError], code: str, what: str, where: str, why: str, hint: str) -> SnnfxError:
    return cls(code, what, where=where, why=why, hint=hint)


def format_message(code: str, what: str, where: str = "", why: str = "", hint: str = "") -> str:
    """Join the parts of a message: `code what (where): why`, and the hint on a new line."""
    head = f"{code} {what}"
    if where:
        head += f" ({where})"
    head += f": {why}" if why else "."
    return f"{head}\n{hint}" if hint else head


class CaptureError(SnnfxError):
    """A model cannot be captured as a step graph (codes 2xx)."""


class InputError(SnnfxError, ValueError):
    """An argument of a function or of a net is illegal (codes 3xx)."""


class VerificationError(SnnfxError, AssertionError):
    """A converted net differs from the stepped model (codes 4xx)."""


class PassError(SnnfxError):
    """A pass left an invalid graph, or passes are in an illegal order (codes 5xx, 70x)."""


class AllocationError(SnnfxError, RuntimeError):
    """A net ran out of memory (SNNFX507); `__cause__` is the error of the allocator."""


class ToolError(SnnfxError):
    """A program, package, file or model that a tool needs is missing or unsuitable (codes 6xx)."""


class ExportError(SnnfxError):
    """A net cannot be exported, or the written file is wrong (codes 8xx)."""


class SaveError(SnnfxError):
    """A net cannot be saved or loaded (codes 80x and 82x)."""


class SnnfxWarning(UserWarning):
    """A fallback is in use: the result is correct, but slower to compute or with an option ignored."""


@dataclass(frozen=True)
class Refusal:
    """The reason why a node is not folded: reported by `explain`, never raised.

    Args:
        code: a 1xx code of `CODES`.
        reason: the reason, as a clause, e.g. "`x.mean(0)` operates along dim 0, the batch dimension".
        hint: the remedy, as a sentence, or "".
    """

    code: str
    reason: str
    hint: str = ""


_PACKAGE = os.path.dirname(__file__)
_LIBRARY_PREFIXES = (
    _PACKAGE + os.sep,
    os.path.join(os.path.dirname(_PACKAGE), "passes") + os.sep,  # snnfx.passes in a source checkout
    os.path.dirname(torch.__file__) + os.sep,
    "<",
    contextlib.__file__,
    functools.__file__,
)
_warned: set[object] = set()


def warn(code: str, message: str) -> None:
    """Warn about a fallback, at the line of the user's code that called snnfx."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY_PREFIXES):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{code} {message}", SnnfxWarning, stacklevel=level)


def warn_once(code: str, message: str, *, key: object = None) -> None:
    """Warn about a fallback, once for each `key` (default: the message)."""
    key = (code, message if key is None else key)
    if key not in _warned:
        _warned.add(key)
        warn(code, message)


def describe_code(code: str) -> str:
    """Describe a code: its meaning, an example that fails and one that works."""
    entry = CODES.get(code.upper())
    if entry is None:
        known = ", ".join(sorted(CODES))
        raise InputError("SNNFX309", f"unknown code `{code}`", hint=f"Use one of {known}.")
    parts = [f"{code.upper()}: {entry.title}", "", entry.meaning]
    if entry.fails:
        parts += ["", "Fails:", *("    " + line for line in entry.fails.splitlines())]
    if entry.works:
        parts += ["", "Works:", *("    " + line for line in entry.works.splitlines())]
    return "\n".join(parts)
