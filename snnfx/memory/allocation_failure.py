"""Turn an out-of-memory error into one that names the region and a setting that needs less memory."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

import torch

from snnfx.errors import AllocationError
from snnfx.memory.budget import bytes_as_text
from snnfx.sandbox.internal_faults import first_line

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["explain_allocation_failure", "is_allocation_failure"]

_ON_CPU = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory|Cannot allocate memory")


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error means that an allocation failed."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and bool(_ON_CPU.search(str(error))))


def explain_allocation_failure(net: Net, error: BaseException) -> AllocationError:
    """The error for a failed allocation, with the region that ran and a hint."""
    region = _region_of(error)
    if torch.is_grad_enabled():
        hint = 'Convert with checkpoint="regions" or a memory_budget, or use a smaller batch.'
    else:
        lengths = [plan.length for plan in net._plans.chunks.values() if plan.length is not None]
        asked = net.options.chunk if isinstance(net.options.chunk, int) else min(lengths, default=None)
        smaller = max(1, asked // 2) if asked is not None else 16
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
