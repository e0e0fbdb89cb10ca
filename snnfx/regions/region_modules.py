"""Modules that a converted net runs for its loop and map regions.

Called directly, a region computes one step (or, folded, a large batch). For whole sequences it offers `multi_step` or
`map_steps`, which `snnfx.functional` calls: eagerly a kernel, a Python loop or torch.vmap; under torch.compile one
opaque operator, so that the compiled program does not depend on T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.regions.eager_regions import EagerLoop, EagerMap
from snnfx.regions.first_neuron_step import with_neuron_kernels
from snnfx.regions.operator import run_loop_as_operator, run_map_as_operator
from snnfx.regions.sequence_region import RegionGraph

__all__ = ["LoopRegion", "MapRegion", "PeeledLoopRegion"]


class LoopRegion(EagerLoop):
    """A strongly connected component, stepped over time; one operator under torch.compile."""

    _measured: tuple[Any, RegionGraph | None] | None = None
    """The latest key of `steps_to_measure`, with its first step."""

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run all steps of a sequence: `(outputs [T, *], final state)`."""
        if self.runs_as_operator(constants):
            return run_loop_as_operator(self, x_seq, state, constants)
        return self.loop_eagerly(x_seq, state, constants)

    def steps_to_measure(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run the steps as bound calls do, with kernels for the neurons of the first step."""
        if state is not None or self.first is None:
            return self._step_by_step(x_seq, state, constants)
        key = [x.shape for x in x_seq], x_seq[0].dtype, torch.is_grad_enabled(), [*map(id, constants)]
        if self._measured is None or self._measured[0] != key:
            modules = {k: constant for k, constant in enumerate(constants) if isinstance(constant, nn.Module)}
            graph = with_neuron_kernels(self.first.graph, modules)
            self._measured = key, None if graph is None else RegionGraph(self.first, graph)
        first = self._measured[1]
        return self._step_by_step(x_seq, state, constants, None if first is None else first.forward)


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
