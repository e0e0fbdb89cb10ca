"""Tensors of small whole numbers, stored in one to eight bits an element.

A spike is 1 or 0 and takes four bytes: what is kept for the backward pass is packed, 4 to 32 times smaller, and
unpacked there. Exact for the values that `passes.whole_numbers` proves, and for no others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PackedTensor", "empty_steps", "memory_order", "pack", "packed_bytes", "unpack"]


def _bits_for(largest: int) -> int:
    """Bits of an element: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if largest < 1 << bits)


@functools.cache
def _weights(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each element in a byte is multiplied by."""
    return torch.tensor([1 << shift for shift in range(0, 8, bits)], dtype=dtype, device=device)


@functools.cache
def _elements(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The elements that each of the 256 bytes stands for."""
    shifted = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, bits)
    return (shifted & ((1 << bits) - 1)).to(device=device, dtype=dtype)


_lately: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Packed forms of tensors that are still alive: two readers of one tensor share them."""


@dataclass(frozen=True)
class PackedTensor:
    """A sequence `[T, *]` of whole numbers from 0 to `largest`, a few rows of bytes for each time step.

    Args:
        data: `[T, rows, bytes]` uint8. A row is one sample where the samples are outermost in memory.
        shape: `[T, *]`.
        order: the dimensions of one step, from the outermost to the innermost in memory.
        dtype: of the tensor that was packed.
        largest: the largest value in it.
    """

    data: Tensor
    shape: torch.Size
    order: tuple[int, ...]
    dtype: torch.dtype
    largest: int

    def steps(self, start: int, stop: int) -> PackedTensor:
        """The time steps from `start` to `stop`, still packed."""
        data = self.data[start:stop]
        return replace(self, data=data, shape=torch.Size((data.shape[0], *self.shape[1:])))

    def samples(self, start: int, stop: int) -> PackedTensor:
        """The samples from `start` to `stop` (dimension 1), still packed; they have to be outermost in memory."""
        assert self.has_samples
        data = self.data[:, start:stop]
        return replace(self, data=data, shape=torch.Size((self.shape[0], data.shape[1], *self.shape[2:])))

    @property
    def has_samples(self) -> bool:
        """Whether `samples` can be taken."""
        return _outermost_are_samples(self.order)


def _outermost_are_samples(order: Sequence[int]) -> bool:
    return bool(order) and order[0] == 0


def packed_bytes(shape: torch.Size | tuple[int, ...], largest: int) -> int:
    """The bytes that a packed tensor of this shape takes, if its samples are outermost in memory."""
    each = 1
    for size in shape[2:]:
        each *= size
    rows = shape[0] * (shape[1] if len(shape) > 1 else 1)
    return int(rows * -(-each * _bits_for(largest) // 8))


def pack(x_seq: Tensor, largest: int) -> PackedTensor:
    """Pack a sequence `[T, *]` whose elements are whole numbers from 0 to `largest` (at most 255).

    Example:
        >>> spikes = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
        >>> packed = pack(spikes, largest=1)
        >>> packed.data.dtype, torch.equal(unpack(packed), spikes)
        (torch.uint8, True)
    """
    known = _lately.get(x_seq)
    if known is not None and known[0] == x_seq._version and known[1].largest == largest:
        return known[1]  # type: ignore[no-any-return]
    T, order, bits = x_seq.shape[0], memory_order(x_seq), _bits_for(largest)
    rows = x_seq.shape[1] if _outermost_are_samples(order) else 1
    row, each = x_seq.numel() // max(1, T * rows), 8 // bits
    data = torch.empty((T, rows, -(-row // each)), dtype=torch.uint8, device=x_seq.device)
    for t, x in enumerate(in_order(x_seq.detach(), order).unbind(0)):
        # Step by step: what is needed on the way is small.
        flat = x.reshape(rows, row)
        if each == 1:
            data[t].copy_(flat)
            continue
        groups = (flat if row % each == 0 else F.pad(flat, (0, -row % each))).view(-1, each)
        data[t].view(-1).copy_(torch.mv(groups, _weights(bits, x.dtype, x.device)))
    packed = PackedTensor(data, x_seq.shape, order, x_seq.dtype, largest)
    _lately[x_seq] = (x_seq._version, packed)
    return packed


def unpack(packed: PackedTensor) -> Tensor:
    """The tensor again, in its memory format."""
    whole = empty_steps(packed.shape, packed.order, packed.dtype, packed.data.device)
    bits = _bits_for(packed.largest)
    elements, each = _elements(bits, packed.dtype, packed.data.device), 8 // bits
    for x, data in zip(in_order(whole, packed.order).unbind(0), packed.data.unbind(0), strict=True):
        rows = data.shape[0]
        row = x.numel() // max(1, rows)
        if each == 1:
            x.view(rows, row).copy_(data)
        elif row % each == 0:
            torch.index_select(elements, 0, data.reshape(-1).int(), out=x.view(-1, each))
        else:
            x.view(rows, row).copy_(elements[data.int()].view(rows, -1)[:, :row])
    return whole


def memory_order(x_seq: Tensor) -> tuple[int, ...]:
    """The dimensions of one step of `[T, *]`, from the outermost to the innermost in memory."""
    strides = x_seq.stride()[1:]
    # One sample has no place in memory: it counts as outermost.
    first = 0 if strides and x_seq.shape[1] == 1 else None
    return tuple(sorted(range(len(strides)), key=lambda dim: (dim != first, -strides[dim])))


def in_order(x_seq: Tensor, order: Sequence[int]) -> Tensor:
    """A view of `[T, *]` with the dimensions of a step in this order."""
    return x_seq.permute(0, *(dim + 1 for dim in order))


def empty_steps(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised sequence `[T, *]` with the dimensions of a step in this order in memory."""
    strides, step = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim + 1]
    return torch.empty_strided(tuple(shape), (step, *strides), dtype=dtype, device=device)
