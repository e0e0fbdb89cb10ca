"""Tiles: groups of calls over sequences that can run on a slice of the samples or of the time steps.

Between the calls of a tile no more than a slice is allocated (loop fusion and tiling: Irigoin & Triolet 1988; Wolfe
1989). Samples are independent, so slices of samples share nothing; slices of time steps carry the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.recompute.bit_packing import PackedTensor, empty_steps, memory_order, unpack
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "JoinedSlices",
    "Slices",
    "Tile",
    "TileSlice",
    "join_states",
    "run_tile",
    "slice_ranges",
    "slice_sequence",
    "slice_state",
    "states_can_be_sliced",
]


class Tile(nn.Module):
    """A group of calls over sequences. The tile itself has no parameters.

    Args:
        label: for messages.
        graph: placeholders for sequences, for the state of each loop and for constants, in this order; calls; output
            `((sequences...), (final state of each loop...))`.
        run: executes the graph: `run(tile, *sequences, *states, *constants)`.
        batched: for each input sequence, whether it has a batch dimension, `[T, N, *]`, or not, `[T, *]`.
        by_steps, by_samples: whether the tile can run on slices of time steps, and on slices of samples.
        is_random: whether the tile draws random numbers.
    """

    def __init__(
        self,
        label: str,
        graph: fx.Graph,
        run: Callable[..., Any],
        batched: Sequence[bool],
        by_steps: bool,
        by_samples: bool,
        is_random: bool = False,
    ) -> None:
        super().__init__()
        self.label, self.graph, self.batched = label, graph, tuple(batched)
        self.by_steps, self.by_samples, self.is_random = by_steps, by_samples, is_random
        self.__dict__["run"] = run


def run_tile(
    tile: Any, sequences: Sequence[Any], states: Sequence[Any], constants: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Run a tile: `(output sequences, final state of each loop)`."""
    return tile.run(tile, *sequences, *states, *constants)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Slices:
    """How sequences are cut into slices.

    Args:
        samples: samples per slice, None for all.
        steps: time steps per slice, None for all.
        of: the batch size.
    """

    samples: int | None = None
    steps: int | None = None
    of: int = 0

    @property
    def share(self) -> float:
        """The fraction of the samples that is in one slice."""
        return 1.0 if self.samples is None else self.samples / self.of


@dataclass(frozen=True)
class TileSlice:
    """One slice: ranges `(start, stop)` of samples and of time steps, None for all; `of` is the batch size."""

    samples: tuple[int, int] | None = None
    steps: tuple[int, int] | None = None
    of: int = 0

    def rows(self, size: int) -> tuple[int, int]:
        """The range of the samples in a dimension of this size: other dimensions may be merged into the batch."""
        assert self.samples is not None
        start, stop = self.samples
        per_sample = size // self.of
        return start * per_sample, stop * per_sample

    def full_size(self, size: int) -> int:
        """The size for the whole batch of a dimension that has this size in the slice."""
        if self.samples is None:
            return size
        start, stop = self.samples
        return size // (stop - start) * self.of


def slice_ranges(count: int, length: int | None) -> Iterator[tuple[int, int] | None]:
    """The range of each slice of this length; one None if a single slice covers everything."""
    if length is None or length >= count:
        yield None
        return
    for start in range(0, count, length):
        yield start, min(start + length, count)


def slice_sequence(value: Any, part: TileSlice, batched: bool = True) -> Tensor:
    """A slice, unpacked, of a sequence `[T, N, *]` or, without a batch dimension, `[T, *]`."""
    samples = part.samples if batched else None
    if isinstance(value, PackedTensor):
        if part.steps is not None:
            value = value.steps(*part.steps)
        if samples is not None and value.has_samples:
            return unpack(value.samples(*part.rows(value.shape[1])))
        value = unpack(value)
    elif part.steps is not None:
        value = value[slice(*part.steps)]
    return value if samples is None else value[:, slice(*part.rows(value.shape[1]))]  # type: ignore[no-any-return]


def slice_state(state: Any, part: TileSlice) -> Any:
    """The state of the samples of a slice. Leaves that are not tensors are the same for all samples."""
    if part.samples is None:
        return state
    return pytree.tree_map_only(Tensor, lambda s: s[slice(*part.rows(s.shape[0]))], state)


def states_can_be_sliced(states: Sequence[Any], samples: int) -> bool:
    """Whether dimension 0 of each state tensor is the batch dimension."""
    tensors = [s for s in pytree.tree_leaves(list(states)) if isinstance(s, Tensor)]
    return all(s.dim() > 0 and s.shape[0] == samples for s in tensors)


class JoinedSlices:
    """Assembles a sequence from its slices, without a copy if a single slice covers it.

    Args:
        T: time steps of the whole sequence.
        batched: False for `[T, *]`: slices of samples are then summed.
    """

    def __init__(self, T: int, batched: bool = True) -> None:
        self.T, self.batched = T, batched
        self.whole: Tensor | None = None
        self.zero_slices: list[TileSlice] = []

    def add(self, y: Tensor | None, part: TileSlice) -> None:
        """Add one slice; None stands for zeros."""
        if y is None:
            if self.whole is None:
                self.zero_slices.append(part)
            elif self.batched:
                self._view(part).zero_()
            return
        if self.whole is None and part.steps is None and part.samples is None:
            self.whole = y
            return
        if self.whole is None:
            # Without a batch dimension, a sequence is sliced in time only.
            has_samples = self.batched and part.samples is not None
            sizes = (self.T, part.full_size(y.shape[1]), *y.shape[2:]) if has_samples else (self.T, *y.shape[1:])
            self.whole = empty_steps(sizes, memory_order(y), y.dtype, y.device)
            if not self.batched:
                self.whole.zero_()
            for zeros in self.zero_slices if self.batched else ():
                self._view(zeros).zero_()
        if self.batched:
            self._view(part).copy_(y)
        else:
            self._view(part).add_(y)

    def _view(self, part: TileSlice) -> Tensor:
        assert self.whole is not None
        return slice_sequence(self.whole, part, self.batched)


def join_states(states: Sequence[Any]) -> Any:
    """Concatenate the final states of slices of samples."""
    if len(states) == 1:
        return states[0]
    leaves, spec = zip(*(pytree.tree_flatten(s) for s in states), strict=True)
    columns = zip(*leaves, strict=True)
    return pytree.tree_unflatten([torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns], spec[0])
