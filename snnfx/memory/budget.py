"""How many bytes a call may take."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from snnfx.errors import InputError

__all__ = ["CACHE_FRIENDLY", "bytes_as_text", "free_bytes", "inference_budget", "read_memory_budget"]

CACHE_FRIENDLY = 64 * 2**20
"""Bytes of live intermediates up to which more steps at once are faster on a CPU. Measured on a convolutional SNN
(`tools/bench/bench_csnn.py`): with more, large blocks come from fresh pages each time and page faults dominate; with
less, the calls do."""


_TEXT = re.compile(
    r"(?P<count>(?:\d+\.?\d*|\.\d+)(?:e\d+)?)(?P<unit>\s*(?:(?P<size>[kmgt])(?P<ending>i?b?)|b))?",
    re.IGNORECASE | re.ASCII,
)


def read_memory_budget(budget: Any) -> int | float | None:
    """The value of `memory_budget=`, as bytes, as a part of what is free, or None.

    Args:
        budget: an int, a float up to 1.0, None, or text in any case: "2GiB" and "2G" are 2 * 2**30 bytes, "2GB"
            is 2 * 10**9; "1000000" is bytes, "0.5" (with a point) a part.

    Raises:
        InputError: SNNFX309, it is none of these.

    Example:
        >>> read_memory_budget("1.5kib"), read_memory_budget("2 MB"), read_memory_budget("0.5")
        (1536, 2000000, 0.5)
    """
    found = _number_in(budget) if isinstance(budget, str) else budget
    if found is None and budget is None:
        return None
    if isinstance(found, int) and not isinstance(found, bool) and found > 0:
        return found
    if isinstance(found, float) and 0.0 < found <= 1.0:
        return found
    hint = 'Give bytes (an int, or text as "512MiB"), a part of the free memory (a float up to 1.0), or None.'
    if isinstance(found, float) and found > 1.0:
        hint = 'A float is a part of the free memory, up to 1.0. Give bytes as an int, int(2e9), or as text, "2GB".'
    raise InputError("SNNFX309", f"memory_budget={budget!r}", hint=hint)


def _number_in(text: str) -> int | float | None:
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
