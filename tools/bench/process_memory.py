"""Measure the peak memory of a call through the operating system (Linux)."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["peak_of"]


def peak_of(run: Callable[[], Any]) -> int:
    """Peak resident set during a call, in bytes above the resident set before it.

    The resident set includes freed blocks that malloc keeps. To count live memory only, start the process with
    `MALLOC_MMAP_THRESHOLD_=65536`. Comparable numbers need a fresh process each.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    """VmRSS (current) or VmHWM (peak) of this process, in bytes."""
    found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {key}"
    return int(found.group(1)) * 1024
