"""Modules that a converted net runs for its loop and map regions.

Called directly, a region computes one step (or, folded, a large batch). For whole sequences it offers `multi_step` or
`map_steps`, which `snnfx.functional` calls: eagerly a kernel, a Python loop or torch.vmap; under torch.compile one
opaque operator, so that the compiled program does not depend on T.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from snnfx.regions.eager_regions import EagerLoop, EagerMap
from snnfx.regions.operator import run_loop_as_operator, run_map_as_operator

__all__ = ["LoopRegion", "MapRegion"]


class LoopRegion(EagerLoop):
    """A strongly connected component, stepped over time; one operator under torch.compile."""

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run all steps of a sequence: `(outputs [T, *], final state)`."""
        if self.runs_as_operator(constants):
            return run_loop_as_operator(self, x_seq, state, constants)
        return self.loop_eagerly(x_seq, state, constants)


class MapRegion(EagerMap):
    """A region that is parallel in time but not foldable; one operator under torch.compile."""

    def map_steps(self, x_seq: tuple[Tensor, ...], constants: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Run all steps of a sequence at once: outputs `[T, *]`."""
        if self.runs_as_operator(constants):
            return run_map_as_operator(self, x_seq, constants)
        return self.map_eagerly(x_seq, constants)
