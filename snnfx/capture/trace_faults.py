"""Distinguish faults of snnfx from errors of the model that is traced."""

from __future__ import annotations

import traceback

from snnfx.sandbox.internal_faults import is_internal_fault, surface

__all__ = ["raise_internal_fault"]

_RUN_USER_CODE = (
    "snnfx.capture.consumed_tensors",
    "snnfx.capture.example_values",
    "snnfx.capture.patches",
    "snnfx.capture.proxy",
    "snnfx.capture.setting_reads",
    "snnfx.ops.",
    "snnfx.state.",
)
"""Modules that run operations of the model, so that an error of the model may leave one of their frames innermost."""


def raise_internal_fault(error: Exception, fallback: str) -> None:
    """Raise `error` under tests, or warn once, if the code of capture itself is faulty.

    Args:
        error: the error of a trace.
        fallback: the effect on the user, a clause.
    """
    if is_internal_fault(error) and not _innermost_module(error).startswith(_RUN_USER_CODE):
        surface(error, fallback)


def _innermost_module(error: Exception) -> str:
    """The name of the module whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", ""))
