"""Segments: the parts of a net that the backward pass recomputes, and the forward run of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from snnfx.recompute.batch_statistics import takes_statistics
from snnfx.recompute.replay import Autocast, Modules, replay_rng
from snnfx.recompute.tile import (
    Joined,
    Slices,
    Tile,
    TileSlice,
    cut,
    cut_state,
    joined_states,
    run_tile,
    slices_of,
    states_can_be_cut,
)
from snnfx.sandbox.isolation import RNGState, rng_state
from snnfx.sandbox.torch_internals import pytree

__all__ = ["TILE", "Segment", "SegmentCall", "StatisticsCall", "TileCall", "run_slice", "state_of"]


TILE = -1
"""The place of the tile, where products are 0, 1, ..."""


@dataclass(frozen=True)
class TileCall:
    """A call of a tile in a segment. Values are numbered: first what goes into the segment, then what is made in it.

    Args:
        tile: what is called.
        sequences, constants: the values that it is given.
        states: the values of the states before the first step, or None or () where nothing is handed in.
        makes: the numbers of the sequences that it makes.
    """

    tile: Tile
    sequences: tuple[int, ...]
    states: tuple[Any, ...]
    constants: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True)
class StatisticsCall:
    """Statistics that are taken in a segment.

    Args:
        function: of a sequence and a module.
        x, module: the values that it is given.
        makes: the numbers of mean and variance.
    """

    function: Callable[..., tuple[Tensor, Tensor]]
    x: int
    module: int
    makes: tuple[int, int]


class Segment(nn.Module):
    """What is computed again together.

    Args:
        label: for messages.
        products: tiles that are computed before the statistics are taken, without states.
        statistics: what is taken of the whole sequence.
        tile: what comes last; its sequences and final states are the results.
        slices: how sequences are cut.
        twice: backward computes the products two times, each time slice by slice, so that their results are never there
            as a whole; otherwise once.
        packed: the largest whole number in a sequence that goes in, by number, for those that are kept packed.
        still_packable: whether the proof of that holds at this call (a neuron's settings are live).
    """

    def __init__(
        self,
        label: str,
        products: Sequence[TileCall],
        statistics: Sequence[StatisticsCall],
        tile: TileCall,
        slices: Slices,
        twice: bool,
        packed: Mapping[int, int],
        still_packable: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.label, self.products, self.statistics, self.tile = label, tuple(products), tuple(statistics), tile
        self.slices, self.twice = slices, twice
        self.packed, self.still_packable = dict(packed), still_packable

    @property
    def joint(self) -> tuple[TileCall, ...]:
        """What goes through the slices together."""
        return (self.tile,) if self.statistics else (*self.products, self.tile)

    def plainly(self, values: Sequence[Any]) -> Any:
        """Run it with the history that autograd keeps."""
        table: dict[int, Any] = dict(enumerate(values))
        for product in self.products:
            table.update(zip(product.makes, run_slice([product], table, TileSlice(), ())[0], strict=True))
        for taken in self.statistics:
            table.update(dict.fromkeys(taken.makes))  # the modules are called as they are
        sequences, finals = run_slice([self.tile], table, TileSlice(), [state_of(table, s) for s in self.tile.states])
        return tuple(sequences), tuple(finals)


def state_of(values: Mapping[int, Any], state: Any) -> Any:
    """The state before the first step that a loop is given."""
    return values[state] if isinstance(state, int) else state


@dataclass
class SegmentCall:
    """One run of a segment, and what its backward pass needs to know."""

    segment: Segment
    statics: list[Any]
    spec: pytree.TreeSpec
    tensor_positions: list[int]
    modules: Modules
    flows: list[bool]  # of each product
    results: list[tuple[bool, Any]] = field(default_factory=list)
    result_spec: Any = None
    sequences: int = 0
    T: int = 0
    N: int = 0
    buffers: list[Any] = field(default_factory=list)
    generators: dict[int, RNGState] = field(default_factory=dict)  # by the place of a product, or TILE
    live: dict[int, bool] = field(default_factory=dict)  # by number of the mean: taken now, or running statistics
    autocast: Autocast = field(default_factory=Autocast)

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """What goes in."""
        leaves = list(self.statics)
        for position, value in zip(self.tensor_positions, tensors, strict=True):
            leaves[position] = value
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]

    def packable(self, tensors: Sequence[Tensor]) -> list[int]:
        """The largest whole number in each tensor that is to be packed, 0 for the others."""
        segment = self.segment
        proven = segment.packed if segment.packed and segment.still_packable() else {}
        by_tensor = {id(v): proven.get(n, 0) for n, v in enumerate(self.values(tensors))}
        return [by_tensor.get(id(x), 0) for x in tensors]

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The results, and the statistics, without a history."""
        segment = self.segment
        values: dict[int, Any] = dict(enumerate(self.values(tensors)))
        self._measure(values)
        self.buffers = self.modules.buffers()
        kept: list[Tensor] = []
        if segment.statistics:
            for number, product in enumerate(segment.products):
                if product.tile.is_random:
                    self.generators[number] = rng_state()
                # As backward will cut it: a product of other slices may be rounded otherwise.
                like = (*segment.products, segment.tile) if segment.twice else (product,)
                made, _ = self.in_slices([product], values, self.lengths(like, values))
                values.update(zip(product.makes, made, strict=True))
            for taken in segment.statistics:
                module = values[taken.module]
                self.live[taken.makes[0]] = takes_statistics(module)
                found = taken.function(values[taken.x], module)
                values.update(zip(taken.makes, found, strict=True))
                kept += found if self.live[taken.makes[0]] else [s.clone() for s in found]
        calls = (*segment.products, segment.tile) if segment.twice else segment.joint
        if any(one.tile.is_random for one in segment.joint):
            self.generators[TILE] = rng_state()
        results = self.in_slices(segment.joint, values, self.lengths(calls, values))
        self.sequences = len(results[0])
        return results, kept

    def _measure(self, values: Mapping[int, Any]) -> None:
        """Time steps and samples."""
        self.N = self.segment.slices.of
        for call in (*self.segment.products, self.segment.tile):
            for number in call.sequences:
                x = values.get(number)
                if isinstance(x, Tensor) and x.dim() > 0:
                    self.T = x.shape[0]

    def lengths(self, calls: Sequence[TileCall], values: Mapping[int, Any]) -> tuple[int | None, int | None]:
        """Samples and steps of a slice of these calls, None for all."""
        slices = self.segment.slices
        states = [state_of(values, s) for call in calls for s in call.states]
        by_samples = slices.samples is not None and all(c.tile.by_samples for c in calls)
        by_samples = (
            by_samples and states_can_be_cut(states, self.N) and all(self._has_samples(c, values) for c in calls)
        )
        by_steps = all(c.tile.by_steps for c in calls)
        return slices.samples if by_samples else None, slices.steps if by_steps else None

    def _has_samples(self, call: TileCall, values: Mapping[int, Any]) -> bool:
        """Whether all that goes into a call has these samples."""
        given = zip(call.sequences, call.tile.batched, strict=True)
        shapes = [values[n].shape for n, batched in given if batched and n in values]
        return all(len(shape) > 1 and shape[1] % self.N == 0 for shape in shapes)

    def in_slices(
        self,
        calls: Sequence[TileCall],
        values: Mapping[int, Any],
        lengths: tuple[int | None, int | None],
    ) -> tuple[tuple[Any, ...], Any]:
        """Sequences and final states of the last of some calls, which go through the slices together."""
        last, (samples, steps) = calls[-1], lengths
        joined: list[Joined] = []
        finals = []
        for of_samples in slices_of(self.N, samples):
            states: Sequence[Any] = [
                cut_state(state_of(values, s), TileSlice(of_samples, of=self.N)) for s in last.states
            ]
            for of_steps in slices_of(self.T, steps):
                part = TileSlice(of_samples, of_steps, self.N)
                made, states = run_slice(calls, values, part, states)
                joined = joined or [Joined(self.T) for _ in made]
                for whole, y in zip(joined, made, strict=True):
                    whole.add(y, part)
            finals.append(tuple(states))
        return tuple(whole.whole for whole in joined), joined_states(finals)

    @contextlib.contextmanager
    def as_then(self, parameters: Sequence[Tensor], product: int) -> Iterator[None]:
        """What one of the products, or the tile, met in forward."""
        generators = self.generators.get(product)
        with self.modules.again(parameters, self.buffers), self.autocast.again(), replay_rng(generators):
            yield


def run_slice(
    calls: Sequence[TileCall], values: Mapping[int, Any], part: TileSlice, states: Sequence[Any]
) -> tuple[Sequence[Tensor], Sequence[Any]]:
    """Sequences and final states of the last of some calls on a slice of the values."""
    made: dict[int, Tensor] = {}
    result: tuple[Sequence[Tensor], Sequence[Any]] = ((), ())
    for call in calls:
        sequences = [
            made[n] if n in made else cut(values[n], part, batched)
            for n, batched in zip(call.sequences, call.tile.batched, strict=True)
        ]
        before = states if call is calls[-1] else call.states
        result = run_tile(call.tile, sequences, before, [values[n] for n in call.constants])
        del sequences
        if call is not calls[-1]:
            made.update(zip(call.makes, result[0], strict=True))
    return result
