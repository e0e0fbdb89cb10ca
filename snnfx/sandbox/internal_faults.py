"""Internal faults: errors of snnfx's own code that a fallback would otherwise hide.

Some steps may fail for a reason that lies in the model: an operation without a meta kernel, a module that reads values.
snnfx then takes a fallback. A `KeyError` of snnfx's own code must not disappear the same way. Usage:

    try:
        plan = predict(net)
    except Exception as error:  # the user's modules may refuse meta tensors in any way
        if is_internal_fault(error):
            surface(error, "the chunk length is not planned")
        plan = None
"""

from __future__ import annotations

import traceback
from types import FrameType

from snnfx.errors import SnnfxError, warn_once

__all__ = ["is_internal_fault", "surface"]

STRICT = False
"""Whether internal faults are raised instead of reported by a warning; `tests/conftest.py` sets it."""

_RAISED_BY_TORCH = (RuntimeError, NotImplementedError)
"""Types that torch's operators raise. Their C++ code leaves no frame, so the caller's frame is the innermost one."""

_MODEL_MODULES = ("snnfx.neuron", "snnfx.surrogate", "snnfx.memory_module")
"""Modules that are part of the user's model when it runs."""


def is_internal_fault(error: BaseException) -> bool:
    """Whether snnfx's own code raised an error, rather than torch or the user's model.

    Errors with a code (`SnnfxError`) and the types that torch's operators raise are never internal faults. Any other
    error is one if the innermost frame of its traceback belongs to snnfx.
    """
    if isinstance(error, (SnnfxError, *_RAISED_BY_TORCH)):
        return False
    frame = _innermost_frame(error)
    module = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return (module == "snnfx" or module.startswith("snnfx.")) and module not in _MODEL_MODULES


def surface(error: Exception, fallback: str) -> None:
    """Raise an internal fault under tests; warn once and let the caller fall back otherwise.

    Args:
        error: the fault.
        fallback: the effect on the user, a clause, e.g. "the loop runs step by step".

    Raises:
        Exception: `error` itself, if `STRICT` is set.
    """
    if STRICT:
        error.add_note(f"snnfx: internal fault; without STRICT {fallback}")
        raise error
    calls = traceback.extract_tb(error.__traceback__)
    where = f" in {calls[-1].filename}:{calls[-1].lineno}" if calls else ""
    warn_once(
        "SNNFX509",
        f"{fallback}: snnfx failed with an internal fault ({type(error).__name__}: {error}{where}). "
        "Please report this message.",
        key=(type(error), where),
    )


def _innermost_frame(error: BaseException) -> FrameType | None:
    """The frame that raised an error, or None if it was never raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] if frames else None
