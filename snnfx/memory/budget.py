"""How many bytes a call may take."""

from __future__ import annotations

import os
from typing import Any

import torch

from snnfx.errors import InputError

__all__ = ["CACHE_FRIENDLY", "bytes_as_text", "check_memory_budget", "free_bytes", "inference_budget"]

CACHE_FRIENDLY = 64 * 2**20
"""Bytes of live intermediates up to which more steps at once are faster on a CPU. Measured on a convolutional SNN
(`tools/bench_csnn.py`): with more, large blocks come from fresh pages each time and page faults dominate; with less,
the calls do."""


def check_memory_budget(budget: Any) -> None:
    """Raise for a value that `memory_budget=` does not take."""
    good = budget is None or (
        not isinstance(budget, bool)
        and ((isinstance(budget, int) and budget > 0) or (isinstance(budget, float) and 0.0 < budget <= 1.0))
    )
    if not good:
        hint = "Give a number of bytes (an int), a part of the free memory (a float up to 1.0), or None."
        raise InputError("SNNFX309", f"memory_budget={budget!r}", hint=hint)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the caching allocator holds and nobody uses is free for torch as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = _available_on_linux()
    if available is not None:
        return available
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * CACHE_FRIENDLY


def _available_on_linux() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.endswith("kB\n")}
    except OSError:
        return None
    return found.get("MemAvailable")


def inference_budget(budget: int | float | None, device: torch.device) -> int:
    """The bytes that a call may take: what was asked for, or half of what is free."""
    if isinstance(budget, int):
        return budget
    return int((0.5 if budget is None else budget) * free_bytes(device))


def bytes_as_text(count: float) -> str:
    """A number of bytes for people, e.g. "6.1 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
