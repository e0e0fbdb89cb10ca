"""Products that keep what goes into them packed: a convolution needs its spikes for the gradient of its weight only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from snnfx.recompute.bit_packing import PackedTensor, pack, unpack
from snnfx.recompute.tile import run_tile
from snnfx.sandbox.torch_internals import are_transforms_active

__all__ = ["PackedInputs", "run_tile_with_packed_inputs", "with_packed_inputs"]


class PackedInputs(nn.Module):
    """Says what a tile may keep packed.

    Args:
        largest: the largest whole number in each of its sequences, 0 for those that are no whole numbers.
        still_packable: whether the proof of that holds at this call (a neuron's settings are live).
    """

    def __init__(self, largest: Sequence[int], still_packable: Callable[[], bool]) -> None:
        super().__init__()
        self.largest, self.still_packable = tuple(largest), still_packable


def run_tile_with_packed_inputs(
    packed: PackedInputs, tile: Any, sequences: Sequence[Any], states: Sequence[Any], constants: Sequence[Any]
) -> Any:
    """`run_tile`, with a history that keeps sequences of whole numbers packed."""
    is_transformed = torch.compiler.is_compiling() or are_transforms_active()
    if is_transformed or not torch.is_grad_enabled() or not packed.still_packable():
        return run_tile(tile, sequences, states, constants)
    pairs = [(x, _packer(x, largest)) for x, largest in zip(sequences, packed.largest, strict=True) if largest]
    with with_packed_inputs(pairs):
        return run_tile(tile, sequences, states, constants)


def _packer(x_seq: Tensor, largest: int) -> Callable[[], PackedTensor]:
    return lambda: pack(x_seq, largest)


@contextmanager
def with_packed_inputs(pairs: Sequence[tuple[Tensor, Callable[[], PackedTensor]]]) -> Iterator[None]:
    """Where autograd would keep one of these tensors, or a view of all of it, it keeps its packed form instead."""

    known = list(pairs)

    def keep(value: Tensor) -> _Packed | _AsItIs:
        for x_seq, packed in known:
            if _is_all_of(value, x_seq):
                return _Packed(packed(), value.size(), value.stride())
        return _AsItIs(value.detach(), value._version)

    try:
        with saved_tensors_hooks(keep, lambda kept: kept.value()):
            yield
    finally:
        known.clear()  # the history holds its hooks, and so what they know


def _is_all_of(value: Tensor, x_seq: Tensor) -> bool:
    """Whether a tensor has the elements of another one, in the same memory without gaps."""
    if value.data_ptr() != x_seq.data_ptr() or value.numel() != x_seq.numel() or value.dtype != x_seq.dtype:
        return False
    dense = torch.ops.aten.is_non_overlapping_and_dense
    return value.numel() > 0 and dense(value) and dense(x_seq)


@dataclass
class _Packed:
    packed: PackedTensor
    size: torch.Size
    stride: tuple[int, ...]

    def value(self) -> Tensor:
        return unpack(self.packed).as_strided(self.size, self.stride)


@dataclass
class _AsItIs:
    """Any other tensor; autograd leaves it to whoever keeps something for it to find out about changes."""

    tensor: Tensor
    version: int

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {list(self.tensor.shape)} is at version {self.tensor._version}; expected version "
                f"{self.version} instead."
            )
        return self.tensor
