"""Running steps a second time as they were run the first time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from snnfx.recompute.replay import replay_rng
from snnfx.regions.region_modules import buffers_of
from snnfx.sandbox.isolation import rng_state

__all__ = ["RepeatContext"]


class RepeatContext:
    """What a run meets besides inputs and state: the buffers that it changes, and where random numbers come from.

    Args:
        modules: those in training whose buffers a run changes.
        draws: whether it draws random numbers.
    """

    def __init__(self, modules: Sequence[nn.Module], draws: bool) -> None:
        self.buffers = buffers_of(modules)
        self.random = rng_state() if draws else None

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Run as then; what changes has been counted already, so it is put back to what it is now."""
        now = [(buffer, buffer.clone()) for buffer, _ in self.buffers]
        with replay_rng(self.random):
            _set(self.buffers)
            try:
                yield
            finally:
                _set(now)


def _set(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in buffers:
        # Past the version counter: the graph of a backward pass may hold the buffer.
        buffer.data.copy_(value)
