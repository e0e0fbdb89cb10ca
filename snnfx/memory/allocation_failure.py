"""Turn an out-of-memory error into one that names the region and a setting that needs less memory."""

from __future__ import annotations

import re
import traceback

import torch

from snnfx.errors import AllocationError
from snnfx.memory.budget import bytes_as_text
from snnfx.sandbox.internal_faults import first_line

__all__ = ["explain_allocation_failure", "is_allocation_failure"]

_ON_CPU = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory|Cannot allocate memory")


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error means that an allocation failed."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and bool(_ON_CPU.search(str(error))))


def explain_allocation_failure(error: BaseException, chunk: int | None) -> AllocationError:
    """The error for a failed allocation, with the region that ran and a hint.

    Args:
        error: raised by PyTorch or Python.
        chunk: the time steps of one chunk in inference; None where it is unknown.
    """
    region = _region_of(error)
    if torch.is_grad_enabled():
        hint = 'Convert with checkpoint="regions" or a memory_budget, or use a smaller batch.'
    else:
        smaller = max(1, chunk // 2) if chunk is not None else 16
        hint = f"Call net.eval(), since only evaluation mode runs in chunks, and convert with chunk={smaller} or a "
        hint += "memory_budget; or use a smaller batch."
    match = re.search(r"allocate (\d+) bytes", str(error))
    size = f" of {bytes_as_text(int(match.group(1)))}" if match else ""
    why = first_line(error).rstrip(".") + "."
    return AllocationError("SNNFX507", f"an allocation{size} failed", where=region, why=why, hint=hint)


def _region_of(error: BaseException) -> str:
    """The call of the emitted graph that ran, from the traceback through its generated code."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith("<eval_with_key>") and frame.line:
            name = re.match(r"\s*(\w+) = ", frame.line)
            if name:
                return name.group(1)
    return ""
