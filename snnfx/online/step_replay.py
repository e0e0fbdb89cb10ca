"""Replay time steps: restore the buffers and the RNG state of their first run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from snnfx.recompute.replay import replay_rng
from snnfx.regions.sequence_region import buffers_of
from snnfx.sandbox.isolation import rng_state

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
        self.buffers = buffers_of(modules)
        self.persistent, self.restore_functions = persistent, persistent()
        self.rng = rng_state() if is_random else None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the snapshot inside the block, and the current values after it.

        The first run has already updated the buffers, so the replay must not update them a second time.
        """
        current = [(buffer, buffer.clone()) for buffer, _ in self.buffers]
        current_functions = self.persistent()
        with replay_rng(self.rng):
            _copy_into(self.buffers)
            _run_all(self.restore_functions)
            try:
                yield
            finally:
                _copy_into(current)
                _run_all(current_functions)


def _run_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _copy_into(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        # `.data` bypasses the version counter: an autograd graph may have saved the buffer for backward.
        buffer.data.copy_(value)
