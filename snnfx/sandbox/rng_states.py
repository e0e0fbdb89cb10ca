"""Save and restore the states of the global random number generators of torch, Python and NumPy."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["RNGState", "numpy_rng_state", "restore_numpy_rng_state", "rng_restorer", "rng_state", "rng_states"]


class RNGState:
    """RNG states of torch, first the CPU generator, then the CUDA devices; see `rng_state`."""

    def __init__(self, states: list[Tensor]) -> None:
        self.states = states

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RNGState) or len(self.states) != len(other.states):
            return False
        return all(torch.equal(a, b) for a, b in zip(self.states, other.states, strict=True))

    def restore(self) -> None:
        """Set the generators of torch to these states."""
        torch.set_rng_state(self.states[0])
        if len(self.states) > 1:
            torch.cuda.set_rng_state_all(self.states[1:])


def rng_state() -> RNGState:
    """The current RNG states of torch."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return RNGState([torch.get_rng_state(), *cuda_states])


def rng_restorer() -> Callable[[], None]:
    """A function that restores the present states of the generators of torch, Python and NumPy."""
    of_torch, of_python, of_numpy = rng_state(), random.getstate(), numpy_rng_state()

    def restore() -> None:
        of_torch.restore()
        random.setstate(of_python)
        restore_numpy_rng_state(of_numpy)

    return restore


def rng_states() -> tuple[RNGState, object, bytes | None]:
    """The present states of the generators of torch, Python and NumPy, to compare."""
    return rng_state(), random.getstate(), numpy_rng_state()


def numpy_rng_state() -> bytes | None:
    """The RNG state of NumPy's global generator; None if NumPy is not imported."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else pickle.dumps(numpy.random.get_state())


def restore_numpy_rng_state(state: bytes | None) -> None:
    """Restore the RNG state that `numpy_rng_state` returned."""
    numpy = sys.modules.get("numpy")
    if state is not None and numpy is not None:
        numpy.random.set_state(pickle.loads(state))
