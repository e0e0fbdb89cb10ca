"""How much memory a call takes, as the operating system counts it (Linux)."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["peak_of"]


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes that a call takes at its widest, above what the process held before it.

    The resident set counts what malloc keeps as well: for what is alive, run the process with
    `MALLOC_MMAP_THRESHOLD_=65536`. For comparable numbers, each needs a process of its own.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    """VmRSS (now) or VmHWM (most) of this process, in bytes."""
    found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "no /proc/self/status"
    return int(found.group(1)) * 1024
