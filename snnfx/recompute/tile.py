"""A tile: a few calls over sequences that can be run on a slice of them, some samples or some time steps.

Between the calls of a tile there is never more than a slice (loop fusion and tiling: Irigoin & Triolet 1988; Wolfe
1989). Samples are independent of each other, so slices of samples need nothing of each other; slices of time hand on
their state.
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
    "Joined",
    "Slices",
    "Tile",
    "TileSlice",
    "cut",
    "cut_state",
    "joined_states",
    "run_tile",
    "slices_of",
    "states_can_be_cut",
]


class Tile(nn.Module):
    """A few calls over sequences; it has no parameters of its own.

    Args:
        label: for messages.
        graph: placeholders for sequences, for the state of each loop and for constants, in this order; calls; output
            `((sequences...), (final state of each loop...))`.
        run: what runs it: `run(tile, *sequences, *states, *constants)`.
        batched: of each sequence that goes in, whether it has a batch: `[T, N, *]`; else it is `[T, *]`.
        by_steps, by_samples: whether slices of time steps and of samples may be run on their own.
        is_random: whether it draws random numbers.
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
    """`(sequences, the final state of each loop)`."""
    return tile.run(tile, *sequences, *states, *constants)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Slices:
    """How sequences are cut.

    Args:
        samples: in a slice, None for all.
        steps: in a slice, None for all.
        of: how many samples there are.
    """

    samples: int | None = None
    steps: int | None = None
    of: int = 0

    @property
    def share(self) -> float:
        """Of all samples, what a slice has."""
        return 1.0 if self.samples is None else self.samples / self.of


@dataclass(frozen=True)
class TileSlice:
    """A slice: samples and time steps from the first number up to the second, None for all; `of` so many samples."""

    samples: tuple[int, int] | None = None
    steps: tuple[int, int] | None = None
    of: int = 0

    def rows(self, count: int) -> tuple[int, int]:
        """Where the samples lie in a dimension of this size: others may be merged into it, behind them."""
        assert self.samples is not None
        first, last = self.samples
        each = count // self.of
        return first * each, last * each

    def all_rows(self, count: int) -> int:
        """The size for all samples of what is of this size for those of the slice."""
        if self.samples is None:
            return count
        first, last = self.samples
        return count // (last - first) * self.of


def slices_of(count: int, length: int | None) -> Iterator[tuple[int, int] | None]:
    """From where to where each slice goes; None for one that is all."""
    if length is None or length >= count:
        yield None
        return
    for start in range(0, count, length):
        yield start, min(start + length, count)


def cut(value: Any, part: TileSlice, batched: bool = True) -> Tensor:
    """A slice of a sequence, `[T, N, *]` or, without a batch, `[T, *]`; unpacked."""
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


def cut_state(state: Any, part: TileSlice) -> Any:
    """The state of some samples; numbers stay as they are."""
    if part.samples is None:
        return state
    return pytree.tree_map_only(Tensor, lambda s: s[slice(*part.rows(s.shape[0]))], state)


def states_can_be_cut(states: Sequence[Any], samples: int) -> bool:
    """Whether each tensor in them has the batch in front."""
    tensors = [s for s in pytree.tree_leaves(list(states)) if isinstance(s, Tensor)]
    return all(s.dim() > 0 and s.shape[0] == samples for s in tensors)


class Joined:
    """A sequence put together from its slices; one that is all of it is taken as it is.

    Args:
        T: time steps of the whole.
        batched: False for `[T, *]`: what slices of samples give is then added up.
    """

    def __init__(self, T: int, batched: bool = True) -> None:
        self.T, self.batched = T, batched
        self.whole: Tensor | None = None
        self.missing: list[TileSlice] = []

    def add(self, y: Tensor | None, part: TileSlice) -> None:
        """One slice, None for zeros."""
        if y is None:
            if self.whole is None:
                self.missing.append(part)
            elif self.batched:
                self._at(part).zero_()
            return
        if self.whole is None and part.steps is None and part.samples is None:
            self.whole = y
            return
        if self.whole is None:
            # A sequence without a batch is only cut in time.
            is_cut = self.batched and part.samples is not None
            sizes = (self.T, part.all_rows(y.shape[1]), *y.shape[2:]) if is_cut else (self.T, *y.shape[1:])
            self.whole = empty_steps(sizes, memory_order(y), y.dtype, y.device)
            if not self.batched:
                self.whole.zero_()
            for other in self.missing if self.batched else ():
                self._at(other).zero_()
        if self.batched:
            self._at(part).copy_(y)
        else:
            self._at(part).add_(y)

    def _at(self, part: TileSlice) -> Tensor:
        assert self.whole is not None
        return cut(self.whole, part, self.batched)


def joined_states(states: Sequence[Any]) -> Any:
    """The final states of slices of samples as one."""
    if len(states) == 1:
        return states[0]
    leaves, spec = zip(*(pytree.tree_flatten(s) for s in states), strict=True)
    columns = zip(*leaves, strict=True)
    return pytree.tree_unflatten([torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns], spec[0])
