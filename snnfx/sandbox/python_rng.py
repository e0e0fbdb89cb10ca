"""RNG states of Python and NumPy."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

__all__ = ["python_rng_state", "restore_python_rng_state"]


def python_rng_state() -> tuple[Any, bytes | None]:
    """The RNG states of Python and, where it is imported, NumPy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else pickle.dumps(numpy.random.get_state())


def restore_python_rng_state(state: tuple[Any, bytes | None]) -> None:
    """Restore the RNG states that `python_rng_state` returned."""
    random.setstate(state[0])
    numpy = sys.modules.get("numpy")
    if state[1] is not None and numpy is not None:
        numpy.random.set_state(pickle.loads(state[1]))
