"""Modules that a converted net runs for its loop and map regions.

Called directly, a region computes one step (or, folded, a large batch). For whole sequences it offers `multi_step` or
`map_steps`, which `snnfx.functional` calls: eagerly a kernel, a Python loop or torch.vmap; under torch.compile one
opaque operator, so that the compiled program does not depend on T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snnfx.regions.eager_regions import EagerLoop, EagerMap
from snnfx.regions.operator import run_loop_as_operator, run_map_as_operator

__all__ = ["LoopRegion", "MapRegion", "PeeledLoopRegion"]


class LoopRegion(EagerLoop):
    """A strongly connected component, stepped over time; one operator under torch.compile."""

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run all steps of a sequence: `(outputs [T, *], final state)`."""
        if self.runs_as_operator(constants):
            return run_loop_as_operator(self, x_seq, state, constants)
        return self.loop_eagerly(x_seq, state, constants)


class PeeledLoopRegion(LoopRegion):
    """A loop whose first step from the reset state is a graph of other operations (loop peeling)."""

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run the first step, then all others from its state: `(outputs [T, *], final state)`."""
        if state is not None:
            return super().multi_step(x_seq, state, constants)
        outputs, state = self.forward(*constants, *[x[0] for x in x_seq], None)
        if x_seq[0].shape[0] == 1:
            return tuple([y.unsqueeze(0) for y in outputs]), state
        later, state = super().multi_step(tuple([x[1:] for x in x_seq]), state, constants)
        return tuple([torch.cat((y.unsqueeze(0), rest)) for y, rest in zip(outputs, later, strict=True)]), state


class MapRegion(EagerMap):
    """A region that is parallel in time but not foldable; one operator under torch.compile."""

    def map_steps(self, x_seq: tuple[Tensor, ...], constants: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Run all steps of a sequence at once: outputs `[T, *]`."""
        if self.runs_as_operator(constants):
            return run_map_as_operator(self, x_seq, constants)
        return self.map_eagerly(x_seq, constants)
