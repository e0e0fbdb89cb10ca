"""Segments: parts of a net that the backward pass recomputes, and their forward run in slices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from snnfx.recompute.batch_statistics import uses_batch_statistics
from snnfx.recompute.replay import AutocastState, Buffers, ModuleReplicas, ModuleSettings, replay_rng
from snnfx.recompute.tile import (
    JoinedSlices,
    Slices,
    Tile,
    TileSlice,
    join_states,
    run_tile,
    slice_ranges,
    slice_sequence,
    slice_state,
    states_can_be_sliced,
)
from snnfx.sandbox.rng_states import RNGState, rng_state
from snnfx.sandbox.torch_internals import pytree

__all__ = ["TILE", "Segment", "SegmentCall", "StatisticsCall", "TileCall", "run_slice", "state_of"]


TILE = -1
"""The index of the tile in `SegmentCall.rng_states`, where products are 0, 1, ..."""


@dataclass(frozen=True)
class TileCall:
    """A call of a tile in a segment. Values are numbered: the inputs of the segment first, then its intermediates.

    Args:
        tile: the called tile.
        sequences, constants: the numbers of its arguments.
        states: the numbers of the states before the first step; None or () where the caller passes no state.
        outputs: the numbers of its output sequences.
    """

    tile: Tile
    sequences: tuple[int, ...]
    states: tuple[Any, ...]
    constants: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class StatisticsCall:
    """A call in a segment that computes batch statistics.

    Args:
        function: takes a sequence and a module, returns mean and variance.
        x, module: the numbers of its arguments.
        outputs: the numbers of mean and variance.
    """

    function: Callable[..., tuple[Tensor, Tensor]]
    x: int
    module: int
    outputs: tuple[int, int]


class Segment(nn.Module):
    """Calls that the backward pass recomputes together.

    Args:
        label: for messages.
        products: tiles that run before the statistics (convolutions, linear layers); they have no state.
        statistics: batch statistics of whole sequences.
        tile: the last call; its sequences and final states are the results of the segment.
        slices: how sequences are cut.
        recompute_products_twice: whether backward computes the products two times, each time slice by slice, so that
            their whole results are never allocated; otherwise once.
        largest: the largest integer in each input sequence that is saved in packed form, by its number.
        still_packable: whether these bounds hold at this call (the settings of a neuron can change between calls).
    """

    def __init__(
        self,
        label: str,
        products: Sequence[TileCall],
        statistics: Sequence[StatisticsCall],
        tile: TileCall,
        slices: Slices,
        recompute_products_twice: bool,
        largest: Mapping[int, int],
        still_packable: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.label, self.products, self.statistics, self.tile = label, tuple(products), tuple(statistics), tile
        self.slices, self.recompute_products_twice = slices, recompute_products_twice
        self.largest, self.still_packable = dict(largest), still_packable

    @property
    def calls(self) -> tuple[TileCall, ...]:
        """The products and the tile."""
        return (*self.products, self.tile)

    @property
    def fused_calls(self) -> tuple[TileCall, ...]:
        """The calls that run on one slice before the next slice begins: statistics separate products from the tile."""
        return (self.tile,) if self.statistics else self.calls

    def run_with_autograd(self, values: Sequence[Any]) -> Any:
        """Run the segment without recomputation: autograd saves the intermediates."""
        table: dict[int, Any] = dict(enumerate(values))
        for product in self.products:
            table.update(zip(product.outputs, run_slice([product], table, TileSlice(), ())[0], strict=True))
        for call in self.statistics:
            table.update(dict.fromkeys(call.outputs))  # without statistics, the tile calls the BatchNorm module
        sequences, finals = run_slice([self.tile], table, TileSlice(), [state_of(table, s) for s in self.tile.states])
        return tuple(sequences), tuple(finals)


def state_of(values: Mapping[int, Any], state: Any) -> Any:
    """The state before the first step: a value by its number, or None or ()."""
    return values[state] if isinstance(state, int) else state


@dataclass
class SegmentCall:
    """One forward run of a segment, with everything that its backward pass needs besides saved tensors."""

    segment: Segment
    non_tensors: list[Any]
    spec: pytree.TreeSpec
    tensor_positions: list[int]
    modules: ModuleSettings
    needs_gradient: list[bool]  # of each product
    result_leaves: list[tuple[bool, Any]] = field(default_factory=list)  # (is a tensor, the value if not)
    result_spec: Any = None
    sequence_count: int = 0
    T: int = 0
    N: int = 0
    buffers: Buffers = field(default_factory=list)
    rng_states: dict[int, RNGState] = field(default_factory=dict)  # by the index of a product, or TILE
    from_batch: dict[int, bool] = field(default_factory=dict)  # by number of the mean: False for running statistics
    autocast: AutocastState = field(default_factory=AutocastState)

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """The inputs of the segment, with these tensors."""
        leaves = list(self.non_tensors)
        for position, value in zip(self.tensor_positions, tensors, strict=True):
            leaves[position] = value
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]

    def largest_integers(self, tensors: Sequence[Tensor]) -> list[int]:
        """The largest integer in each tensor that is saved in packed form, 0 for the others."""
        segment = self.segment
        largest = segment.largest if segment.largest and segment.still_packable() else {}
        by_tensor = {id(v): largest.get(n, 0) for n, v in enumerate(self.values(tensors))}
        return [by_tensor.get(id(x), 0) for x in tensors]

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """Run the segment without autograd: the results, and the batch statistics."""
        segment = self.segment
        values: dict[int, Any] = dict(enumerate(self.values(tensors)))
        self._infer_sizes(values)
        self.buffers = self.modules.copy_buffers()
        statistics: list[Tensor] = []
        twice = segment.recompute_products_twice
        if segment.statistics:
            for index, product in enumerate(segment.products):
                if product.tile.is_random:
                    self.rng_states[index] = rng_state()
                # The same slices as in backward: a product of other slices may round differently.
                lengths = self.slice_lengths(segment.calls if twice else (product,), values)
                outputs, _ = self.run_in_slices([product], values, lengths)
                values.update(zip(product.outputs, outputs, strict=True))
            for call in segment.statistics:
                module = values[call.module]
                from_batch = self.from_batch[call.outputs[0]] = uses_batch_statistics(module)
                mean_and_var = call.function(values[call.x], module)
                values.update(zip(call.outputs, mean_and_var, strict=True))
                statistics += mean_and_var if from_batch else [s.clone() for s in mean_and_var]
        if any(call.tile.is_random for call in segment.fused_calls):
            self.rng_states[TILE] = rng_state()
        lengths = self.slice_lengths(segment.calls if twice else segment.fused_calls, values)
        results = self.run_in_slices(segment.fused_calls, values, lengths)
        self.sequence_count = len(results[0])
        return results, statistics

    def _infer_sizes(self, values: Mapping[int, Any]) -> None:
        """Set the number of time steps and of samples."""
        self.N = self.segment.slices.of
        for call in self.segment.calls:
            for number in call.sequences:
                x = values.get(number)
                if isinstance(x, Tensor) and x.dim() > 0:
                    self.T = x.shape[0]

    def slice_lengths(self, calls: Sequence[TileCall], values: Mapping[int, Any]) -> tuple[int | None, int | None]:
        """Samples and time steps per slice of these calls, None for all."""
        slices = self.segment.slices
        states = [state_of(values, s) for call in calls for s in call.states]
        by_samples = slices.samples is not None and all(c.tile.by_samples for c in calls)
        by_samples = (
            by_samples and states_can_be_sliced(states, self.N) and all(self._has_samples(c, values) for c in calls)
        )
        by_steps = all(c.tile.by_steps for c in calls)
        return slices.samples if by_samples else None, slices.steps if by_steps else None

    def _has_samples(self, call: TileCall, values: Mapping[int, Any]) -> bool:
        """Whether dimension 1 of all batched inputs of a call is the batch dimension."""
        inputs = zip(call.sequences, call.tile.batched, strict=True)
        shapes = [values[n].shape for n, batched in inputs if batched and n in values]
        return all(len(shape) > 1 and shape[1] % self.N == 0 for shape in shapes)

    def run_in_slices(
        self,
        calls: Sequence[TileCall],
        values: Mapping[int, Any],
        lengths: tuple[int | None, int | None],
    ) -> tuple[tuple[Any, ...], Any]:
        """Run calls slice by slice: the sequences and final states of the last call."""
        last, (samples, steps) = calls[-1], lengths
        joined: list[JoinedSlices] = []
        finals = []
        for sample_range in slice_ranges(self.N, samples):
            states: Sequence[Any] = [
                slice_state(state_of(values, s), TileSlice(sample_range, of=self.N)) for s in last.states
            ]
            for step_range in slice_ranges(self.T, steps):
                part = TileSlice(sample_range, step_range, self.N)
                outputs, states = run_slice(calls, values, part, states)
                joined = joined or [JoinedSlices(self.T) for _ in outputs]
                for sequence, y in zip(joined, outputs, strict=True):
                    sequence.add(y, part)
            finals.append(tuple(states))
        return tuple(sequence.whole for sequence in joined), join_states(finals)

    @contextlib.contextmanager
    def replayed(self, replicas: ModuleReplicas, index: int) -> Iterator[None]:
        """Restore buffers, autocast and RNG state of the forward run of one product, or of the tile."""
        replicas.restart()
        with self.autocast.restored(), replay_rng(self.rng_states.get(index)):
            yield


def run_slice(
    calls: Sequence[TileCall], values: Mapping[int, Any], part: TileSlice, states: Sequence[Any]
) -> tuple[Sequence[Tensor], Sequence[Any]]:
    """Run calls on one slice of the values: the sequences and final states of the last call."""
    intermediates: dict[int, Tensor] = {}
    result: tuple[Sequence[Tensor], Sequence[Any]] = ((), ())
    for call in calls:
        sequences = [
            intermediates[n] if n in intermediates else slice_sequence(values[n], part, batched)
            for n, batched in zip(call.sequences, call.tile.batched, strict=True)
        ]
        before = states if call is calls[-1] else call.states
        result = run_tile(call.tile, sequences, before, [values[n] for n in call.constants])
        del sequences
        if call is not calls[-1]:
            intermediates.update(zip(call.outputs, result[0], strict=True))
    return result
