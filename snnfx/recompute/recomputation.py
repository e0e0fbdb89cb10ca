"""Computing again in the backward pass what the forward pass did not keep.

Revolve and its kin trade recomputation for memory (Griewank & Walther 2000; Chen et al. 2016). Here a segment is a
tile (`norm -> neurons -> pool`) with the statistics that it normalises by and, if that is wanted, the products in
front of it. Forward runs it without a history, slice by slice, and keeps what enters it, spikes packed in bits;
backward runs the slices again and takes vector-Jacobian products (`snnfx.recompute.segment_vjp`). So of its insides no
more than a slice is alive. State is a value, so nothing has to be put back afterwards; what a second run could change
or see differently is replayed: random numbers, autocast, the mode of modules, and buffers, which it gets as copies.
Statistics are kept, so they move once.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import warn_once
from snnfx.ops.first_derivatives import refuse_second_derivative
from snnfx.recompute.batch_statistics import as_its_own, takes_statistics
from snnfx.recompute.bit_packing import PackedTensor, pack
from snnfx.recompute.replay import Autocast, Modules, parameters_of, recompute_lock, replay_rng
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
from snnfx.sandbox.torch_internals import are_transforms_active, pytree
from snnfx.state.hooks import has_forward_hooks

__all__ = ["TILE", "Segment", "StatisticsCall", "TileCall", "run_segment"]


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


def run_segment(segment: Segment, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Run a segment so that its backward pass computes it again: `(sequences, final states)`.

    It keeps its history as usual where that cannot be done: under torch.compile (whose own partitioner decides what to
    compute again), under transforms of torch.func, without samples, and while a module in it has forward hooks, which
    would fire twice.
    """
    if torch.compiler.is_compiling() or are_transforms_active() or not torch.is_grad_enabled():
        return segment.plainly(values)  # type: ignore[no-any-return]
    leaves, spec = pytree.tree_flatten(values)
    modules = [m for leaf in leaves if isinstance(leaf, nn.Module) for m in leaf.modules()]
    parameters = parameters_of(modules)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    is_empty = any(t.numel() == 0 for t in tensors)
    if is_empty or not any(t.requires_grad for t in (*tensors, *parameters)):
        return segment.plainly(values)  # type: ignore[no-any-return]
    if any(map(has_forward_hooks, modules)):
        what = f"{segment.label} is not computed again in backward, and its history is kept"
        warn_once("SNNFX504", f"{what}: a module in it has forward hooks, which would fire twice.")
        return segment.plainly(values)  # type: ignore[no-any-return]
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    statics = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    flows = [_flows(product, values) for product in segment.products]
    with recompute_lock:
        call = SegmentCall(segment, statics, spec, positions, Modules(modules, parameters), flows)
        found = iter(_Recompute.apply(call, *tensors, *parameters))
    return pytree.tree_unflatten(  # type: ignore[no-any-return]
        [next(found) if is_tensor else value for is_tensor, value in call.results], call.result_spec
    )


def _flows(call: TileCall, values: Sequence[Any]) -> bool:
    """Whether a gradient goes back through a product: to something that goes in, or to a parameter."""
    leaves = pytree.tree_leaves([values[n] for n in (*call.sequences, *call.constants)])
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    tensors += [p for x in leaves if isinstance(x, nn.Module) for p in x.parameters()]
    return any(x.requires_grad for x in tensors)


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


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SegmentCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        count = len(call.tensor_positions)
        inputs, parameters = tensors[:count], tensors[count:]
        packable = call.packable(inputs)
        outputs, statistics = call.forward(inputs)
        leaves, call.result_spec = pytree.tree_flatten(outputs)
        call.results = [(isinstance(y, Tensor), None if isinstance(y, Tensor) else y) for y in leaves]
        kept: list[Tensor] = []
        ctx.packed = []
        for x, largest in zip(inputs, packable, strict=True):
            packed = pack(x, largest) if largest else None
            ctx.packed.append(packed and (packed.shape, packed.order, packed.dtype, packed.largest))
            kept.append(x if packed is None else packed.data)
        # Saved like the rest, so that they go when the rest goes.
        ctx.save_for_backward(*kept, *parameters, *statistics)
        ctx.counts = (count, count + len(parameters))
        made = [y for y in leaves if isinstance(y, Tensor)]
        storages = Counter(x.untyped_storage()._cdata for x in (*inputs, *made))
        results = tuple(as_its_own(y) if storages[y.untyped_storage()._cdata] == 1 else y for y in made)
        ctx.mark_non_differentiable(*(y for y in results if not (y.is_floating_point() or y.is_complex())))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        from snnfx.recompute.segment_vjp import backward

        what = "what backward computes again"
        refuse_second_derivative(what, "Convert with checkpoint=None, lower=None: PyTorch keeps a history then.")
        call: SegmentCall = ctx.call
        saved, (first, second) = ctx.saved_tensors, ctx.counts
        inputs: list[Any] = [
            x if packed is None else PackedTensor(x, *packed)
            for x, packed in zip(saved[:first], ctx.packed, strict=True)
        ]
        remaining = iter(grads)
        each = [next(remaining) if is_tensor else None for is_tensor, _ in call.results]
        of_tensors, of_parameters = backward(
            call, inputs, saved[first:second], saved[second:], ctx.needs_input_grad[1:], each
        )
        return None, *of_tensors, *of_parameters
