"""`BoundBitLoop`: a bound loop whose output is bits while all its readers run by events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from snnfx.lowering.elementwise.bound_step import BoundStep
from snnfx.lowering.events.spike_bits import SpikeBits
from snnfx.lowering.events.spike_readers import SpikeReader
from snnfx.regions.bound_loop import MOST_BINDINGS, BoundLoop, FlatSteps, Results
from snnfx.regions.eager_regions import EagerLoop

__all__ = ["BitResults", "BoundBitLoop"]

BitResults = tuple[tuple[SpikeBits], tuple[Any, ...]]


class BoundBitLoop:
    """Runs a loop region whose only output layers read that take bits: `(outputs [T, *], final states)`.

    While all readers run by events, the output is a `SpikeBits`; otherwise the loop runs as a `BoundLoop`.

    Args:
        region, constants, with_finals, steps: as for `BoundLoop`; no constant is a tensor.
        readers: the layers that read the output.
    """

    def __init__(
        self,
        region: EagerLoop,
        constants: Sequence[Any],
        readers: Sequence[SpikeReader],
        with_finals: bool = True,
        steps: FlatSteps | None = None,
    ) -> None:
        self.loop = BoundLoop(region, constants, (), with_finals, steps)
        self.readers = tuple(readers)
        self.step: BoundStep | None = None
        self.bindings = 0

    def __call__(self, *x_seq: Tensor) -> Results | BitResults:
        """Run the kernel that writes bits, or the loop as it runs without readers of bits."""
        if all(reader.runs_by_events for reader in self.readers):
            results = self._run_in_bits(x_seq)
            if results is not None:
                return results
        return self.loop(*x_seq)

    def _run_in_bits(self, x_seq: Sequence[Tensor]) -> BitResults | None:
        """Run the kernel that writes bits; None if there is none for these inputs."""
        results = self._bits(x_seq)
        if results is None and self._bind(x_seq):
            results = self._bits(x_seq)
        return results

    def _bits(self, x_seq: Sequence[Tensor]) -> BitResults | None:
        step = self.step
        results = None if step is None else step.run(x_seq, self.loop.constants)
        if step is None or results is None:
            return None
        (words,), finals = results
        shape, order, T = step.step
        return (SpikeBits(words, (T, *shape), order, step.output_dtypes[0]),), finals

    def _bind(self, x_seq: Sequence[Tensor]) -> bool:
        kernels = self.loop.region.kernels
        if kernels is None or self.bindings >= MOST_BINDINGS:
            return False
        self.bindings += 1
        step = kernels.bound_step(x_seq, self.loop.constants, self.loop.with_finals, in_bits=True)
        self.step = step if isinstance(step, BoundStep) else None
        return self.step is not None
