"""Replay time steps: restore the buffers and the RNG state of their first run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from snnfx.recompute.replay import replay_rng
from snnfx.regions.sequence_region import buffers_of
from snnfx.sandbox.rng_states import rng_state
from snnfx.sandbox.tensor_values import value_restorer

__all__ = ["ReplayContext"]


class ReplayContext:
    """Snapshot, taken before some time steps, of the buffers that they change and of the RNG state.

    Args:
        modules: modules in training mode whose buffers the steps change, such as BatchNorm.
        is_random: whether the steps draw random numbers.
        persistent: takes a snapshot of the buffers and parameters that the steps themselves change; it returns
            functions that restore them.
    """

    def __init__(
        self, modules: Sequence[nn.Module], is_random: bool, persistent: Callable[[], list[Callable[[], None]]]
    ) -> None:
        buffers = buffers_of(modules)
        self._snapshot = lambda: [*map(value_restorer, buffers), *persistent()]
        self._restore_functions = self._snapshot()
        self.rng = rng_state() if is_random else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the snapshot inside the block, and the current values after it.

        The first run has already updated the buffers, so the replay must not update them a second time.
        """
        current = self._snapshot()
        with replay_rng(self.rng):
            _run_all(self._restore_functions)
            try:
                yield
            finally:
                _run_all(current)


def _run_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()
