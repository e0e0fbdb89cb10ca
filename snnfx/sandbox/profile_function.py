"""Set the profile function of a thread back to an earlier one, which may be a profiler written in C."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["restore_profile"]


def restore_profile(before: Any) -> None:
    """Set the profile function that `sys.getprofile` returned.

    Up to Python 3.11, it returns the profiler itself while `cProfile` runs, and `sys.setprofile` would call it.
    """
    if before is None or callable(before):
        sys.setprofile(before)
    else:
        before.enable()
