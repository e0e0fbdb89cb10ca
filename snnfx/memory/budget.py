"""The memory budget of a call: the option `memory_budget`, and the free memory of a device."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from snnfx.errors import InputError

__all__ = [
    "CACHE_FRIENDLY",
    "bytes_as_text",
    "free_bytes",
    "inference_budget",
    "read_memory_budget",
    "steps_as_text",
]

CACHE_FRIENDLY = 64 * 2**20
"""The working set in bytes up to which longer chunks are faster on a CPU. Measured on a convolutional SNN
(`tools/bench/bench_csnn.py`): above it, malloc takes large blocks from fresh pages each time and page faults dominate;
below it, the overhead of calls dominates."""


_TEXT = re.compile(
    r"(?P<count>(?:\d+\.?\d*|\.\d+)(?:e\d+)?)(?P<unit>\s*(?:(?P<size>[kmgt])(?P<ending>i?b?)|b))?",
    re.IGNORECASE | re.ASCII,
)


def read_memory_budget(budget: Any) -> int | float | None:
    """Parse the option `memory_budget` into bytes (int), a fraction of the free memory (float), or None.

    Args:
        budget: an int, a float up to 1.0, None, or text in any case: "2GiB" and "2G" are 2 * 2**30 bytes, "2GB"
            is 2 * 10**9; "1000000" is bytes, "0.5" (with a point) a fraction.

    Raises:
        InputError: SNNFX309, the value is none of these.

    Example:
        >>> read_memory_budget("1.5kib"), read_memory_budget("2 MB"), read_memory_budget("0.5")
        (1536, 2000000, 0.5)
    """
    value = _parse_text(budget) if isinstance(budget, str) else budget
    if value is None and budget is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    hint = 'Use bytes (an int, or text such as "512MiB"), a fraction of the free memory (a float up to 1.0), or None.'
    if isinstance(value, float) and value > 1.0:
        hint = 'A float is a fraction of the free memory, up to 1.0. For bytes use an int, int(2e9), or text, "2GB".'
    raise InputError("SNNFX309", f"memory_budget={budget!r} is not a valid budget", hint=hint)


def _parse_text(text: str) -> int | float | None:
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        return None
    count = match["count"]
    if match["unit"] is None and "." in count and "e" not in count.lower():
        return float(count)
    power = "kmgt".index(match["size"].lower()) + 1 if match["size"] else 0
    base = 1000 if (match["ending"] or "").lower() == "b" else 1024
    return int(count) * base**power if count.isdecimal() else int(float(count) * base**power)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Unused blocks of torch's caching allocator are free for torch as well.
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
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.endswith("kB\n")}
    except OSError:
        return None
    return sizes.get("MemAvailable")


def inference_budget(budget: int | float | None, device: torch.device) -> int:
    """The bytes that a call may allocate: the budget, or half of the free memory if none is set."""
    if isinstance(budget, int):
        return budget
    return int((0.5 if budget is None else budget) * free_bytes(device))


def bytes_as_text(count: float) -> str:
    """Format a number of bytes, e.g. "6.1 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def steps_as_text(steps: int) -> str:
    """Format a number of time steps: "1 step", "16 steps"."""
    return "1 step" if steps == 1 else f"{steps} steps"
