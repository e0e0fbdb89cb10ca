"""Every message snnfx can raise or report, by a stable code.

A message says what happened, where (qualified name and the user's file:line), why, and what to do:

    SNNFX103 cannot fold `head.pool` (models/net.py:41): `x.mean(0)` reduces over dim 0, which is the batch.
    It will be mapped over time instead (slower). Use an explicit feature dim, e.g. `x.mean(1)`, if that was not meant.

Codes are grouped: 1xx why a node is not folded (reported by `explain`, never raised), 2xx capture,
3xx input of a call, 4xx verification, 5xx passes, 6xx tools around the library and online training (61x).
`python -m snnfx explain --code SNNFX103` prints the entry of a code.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from snnfx._codes import CODES, CodeEntry

__all__ = [
    "CODES",
    "AllocationError",
    "CaptureError",
    "CodeEntry",
    "InputError",
    "PassError",
    "Refusal",
    "SnnfxError",
    "SnnfxWarning",
    "ToolError",
    "VerificationError",
    "describe_code",
    "warn_once",
]


class SnnfxError(Exception):
    """Base class of all errors of snnfx.

    Args:
        code: stable code, a key of `CODES`, e.g. ``"SNNFX201"``.
        what: what went wrong, a clause without a final period.
        where: qualified name and file:line, or "" where there is no place to name.
        why: the reason, a sentence.
        hint: what to do about it, a sentence.
    """

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not in the registry of error codes (snnfx/_codes.py)")
        self.code, self.what, self.where, self.why, self.hint = code, what, where, why, hint
        super().__init__(format_message(code, what, where, why, hint))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_error, (type(self), self.code, self.what, self.where, self.why, self.hint))


def _rebuild_error(cls: type[SnnfxError], code: str, what: str, where: str, why: str, hint: str) -> SnnfxError:
    return cls(code, what, where=where, why=why, hint=hint)


def format_message(code: str, what: str, where: str = "", why: str = "", hint: str = "") -> str:
    """Put the parts of a message together in the house form."""
    head = f"{code} {what}"
    if where:
        head += f" ({where})"
    head += f": {why}" if why else "."
    return f"{head}\n{hint}" if hint else head


class CaptureError(SnnfxError):
    """The model cannot be captured as a step graph (codes 2xx)."""


class InputError(SnnfxError, ValueError):
    """What was passed to a function or to a net does not fit (codes 3xx)."""


class VerificationError(SnnfxError, AssertionError):
    """The converted net does not do what the stepped model does (codes 4xx)."""


class PassError(SnnfxError):
    """A pass broke the graph, or was asked for something it cannot do (codes 5xx)."""


class AllocationError(SnnfxError, RuntimeError):
    """Memory ran out while a net was running (SNNFX507); the cause is the error of the allocator."""


class ToolError(SnnfxError):
    """A program or package around the library is missing or was called wrongly (codes 6xx)."""


class SnnfxWarning(UserWarning):
    """A fallback was taken: still right, but slower than it could be."""


@dataclass(frozen=True)
class Refusal:
    """Why a node is not folded: shown by `explain`, never raised.

    Args:
        code: a 1xx code of `CODES`.
        reason: a clause, e.g. "`x.mean(0)` reduces over dim 0, which is the batch".
        hint: what the user can do about it, a sentence, or "".
    """

    code: str
    reason: str
    hint: str = ""


_warned: set[object] = set()


def warn_once(code: str, message: str, *, key: object = None) -> None:
    """Warn about a fallback the first time that `key` (default: the message) is seen."""
    key = (code, message if key is None else key)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(f"{code} {message}", SnnfxWarning, stacklevel=3)


def describe_code(code: str) -> str:
    """The registry entry of a code as text: meaning, a failing example and the fixed one."""
    entry = CODES.get(code.upper())
    if entry is None:
        known = ", ".join(sorted(CODES))
        raise InputError("SNNFX309", f"there is no code `{code}`", why=f"known codes are {known}.")
    parts = [f"{code.upper()}: {entry.title}", "", entry.meaning]
    if entry.fails:
        parts += ["", "Fails:", *("    " + line for line in entry.fails.splitlines())]
    if entry.works:
        parts += ["", "Works:", *("    " + line for line in entry.works.splitlines())]
    return "\n".join(parts)
