"""What to say when an allocation fails while a net runs."""

from __future__ import annotations

import re
import traceback

import torch

from snnfx.errors import AllocationError
from snnfx.memory.budget import bytes_as_text

__all__ = ["explain_allocation_failure", "is_allocation_failure"]

_ON_CPU = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory|Cannot allocate memory")


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error is that of an allocation that failed."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and bool(_ON_CPU.search(str(error))))


def explain_allocation_failure(error: BaseException, chunk: int | None) -> AllocationError:
    """The error with the region that was running, and what would take less.

    Args:
        error: what PyTorch or Python raised.
        chunk: the time steps run at once in inference, None where no number is known.
    """
    region = _region_of(error)
    if torch.is_grad_enabled():
        hint = 'Convert with checkpoint="regions" or a memory_budget, or use a smaller batch.'
    else:
        smaller = max(1, chunk // 2) if chunk is not None else 16
        hint = f"Convert with chunk={smaller} or a memory_budget, call net.eval() for chunks, or use a smaller batch."
    found = re.search(r"allocate (\d+) bytes", str(error))
    size = f" of {bytes_as_text(int(found.group(1)))}" if found else ""
    why = str(error).strip().splitlines()[0].rstrip(".") + "."
    return AllocationError("SNNFX507", f"an allocation{size} failed", where=region, why=why, hint=hint)


def _region_of(error: BaseException) -> str:
    """The call of the emitted graph that was running, from its generated code."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith("<eval_with_key>") and frame.line:
            name = re.match(r"\s*(\w+) = ", frame.line)
            if name:
                return name.group(1)
    return ""
