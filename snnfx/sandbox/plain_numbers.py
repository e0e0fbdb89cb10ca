"""NumPy scalars as Python numbers."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["is_numpy_scalar", "plain_number"]


def is_numpy_scalar(value: Any) -> bool:
    """Whether a value is a number or bool of NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.number | numpy.bool_)


def plain_number(value: Any) -> Any:
    """Convert a NumPy scalar to the Python number of the same value, as torch does; any other value stays."""
    return value.item() if is_numpy_scalar(value) else value
