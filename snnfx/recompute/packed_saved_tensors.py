"""Save integer-valued inputs of a layer in packed form: a convolution needs its spikes only for the weight gradient."""

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

__all__ = ["PackedInputs", "run_tile_with_packed_inputs", "saving_packed"]


class PackedInputs(nn.Module):
    """Which inputs of a tile may be saved in packed form.

    Args:
        largest: the largest integer in each input sequence, 0 for sequences that are not integer-valued.
        still_packable: whether these bounds hold at this call (the settings of a neuron can change between calls).
    """

    def __init__(self, largest: Sequence[int], still_packable: Callable[[], bool]) -> None:
        super().__init__()
        self.largest, self.still_packable = tuple(largest), still_packable


def run_tile_with_packed_inputs(
    packed: PackedInputs, tile: Any, sequences: Sequence[Any], states: Sequence[Any], constants: Sequence[Any]
) -> Any:
    """Run a tile like `run_tile`, saving integer-valued sequences for backward in packed form."""
    is_transformed = torch.compiler.is_compiling() or are_transforms_active()
    if is_transformed or not torch.is_grad_enabled() or not packed.still_packable():
        return run_tile(tile, sequences, states, constants)
    pairs = [(x, _packer(x, largest)) for x, largest in zip(sequences, packed.largest, strict=True) if largest]
    with saving_packed(pairs):
        return run_tile(tile, sequences, states, constants)


def _packer(x_seq: Tensor, largest: int) -> Callable[[], PackedTensor]:
    return lambda: pack(x_seq, largest)


@contextmanager
def saving_packed(pairs: Sequence[tuple[Tensor, Callable[[], PackedTensor]]]) -> Iterator[None]:
    """Make autograd save these tensors, and views of all their elements, in packed form."""

    packers = list(pairs)

    def save(value: Tensor) -> _SavedPacked | _SavedTensor:
        for x_seq, packed in packers:
            if _is_view_of_all(value, x_seq):
                return _SavedPacked(packed(), value.size(), value.stride())
        return _SavedTensor(value.detach(), value._version)

    try:
        with saved_tensors_hooks(save, lambda saved: saved.value()):
            yield
    finally:
        packers.clear()  # the autograd graph keeps its hooks alive, and through them the tensors


def _is_view_of_all(value: Tensor, x_seq: Tensor) -> bool:
    """Whether a tensor has all elements of another one, in the same memory without gaps."""
    if value.data_ptr() != x_seq.data_ptr() or value.numel() != x_seq.numel() or value.dtype != x_seq.dtype:
        return False
    dense = torch.ops.aten.is_non_overlapping_and_dense
    return value.numel() > 0 and dense(value) and dense(x_seq)


@dataclass
class _SavedPacked:
    packed: PackedTensor
    size: torch.Size
    stride: tuple[int, ...]

    def value(self) -> Tensor:
        return unpack(self.packed).as_strided(self.size, self.stride)


@dataclass
class _SavedTensor:
    """An unpacked tensor. With hooks, autograd leaves it to the hook to detect in-place changes."""

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
