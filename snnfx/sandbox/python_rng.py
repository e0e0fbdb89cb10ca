"""RNG states of Python and NumPy."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

__all__ = ["numpy_rng_state", "python_rng_state", "restore_numpy_rng_state", "restore_python_rng_state"]


def python_rng_state() -> tuple[Any, bytes | None]:
    """The RNG states of Python and, where it is imported, NumPy."""
    return random.getstate(), numpy_rng_state()


def restore_python_rng_state(state: tuple[Any, bytes | None]) -> None:
    """Restore the RNG states that `python_rng_state` returned."""
    random.setstate(state[0])
    restore_numpy_rng_state(state[1])


def numpy_rng_state() -> bytes | None:
    """The RNG state of NumPy's global generator; None if NumPy is not imported."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else pickle.dumps(numpy.random.get_state())


def restore_numpy_rng_state(state: bytes | None) -> None:
    """Restore the RNG state that `numpy_rng_state` returned."""
    numpy = sys.modules.get("numpy")
    if state is not None and numpy is not None:
        numpy.random.set_state(pickle.loads(state))
