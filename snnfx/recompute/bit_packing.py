"""Pack tensors of small non-negative integers into one to eight bits per element.

A spike is 0 or 1 and takes four bytes. Tensors saved for backward are packed, which makes them 4 to 32 times smaller,
and unpacked in the backward pass. Exact only for values whose range `snnfx.analysis.integer_ranges` proves.
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
    """Bits per element: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if largest < 1 << bits)


@functools.cache
def _weights(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The factor of each element in a byte."""
    return torch.tensor([1 << shift for shift in range(0, 8, bits)], dtype=dtype, device=device)


@functools.cache
def _elements(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The elements that each of the 256 byte values encodes."""
    shifted = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(0, 8, bits, device=device)
    return (shifted & ((1 << bits) - 1)).to(device=device, dtype=dtype)


_packed_forms: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Packed forms of tensors that are still alive: all readers of a tensor share one."""


@dataclass(frozen=True)
class PackedTensor:
    """A packed sequence `[T, *]` of integers from 0 to `largest`.

    Args:
        data: `[T, rows, bytes]` uint8. A row is one sample if the samples are outermost in memory.
        shape: `[T, *]`.
        order: the dimensions of one time step, from the outermost to the innermost in memory.
        dtype: the dtype of the unpacked tensor.
        largest: the largest integer.
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
        """The samples from `start` to `stop` (dimension 1), still packed; requires `has_samples`."""
        assert self.has_samples
        data = self.data[:, start:stop]
        return replace(self, data=data, shape=torch.Size((self.shape[0], data.shape[1], *self.shape[2:])))

    @property
    def has_samples(self) -> bool:
        """Whether the samples are outermost in memory, so that `samples` works."""
        return _outermost_are_samples(self.order)


def _outermost_are_samples(order: Sequence[int]) -> bool:
    return bool(order) and order[0] == 0


def packed_bytes(shape: torch.Size | tuple[int, ...], largest: int) -> int:
    """Bytes of a packed tensor of this shape whose samples are outermost in memory."""
    per_row = 1
    for size in shape[2:]:
        per_row *= size
    rows = shape[0] * (shape[1] if len(shape) > 1 else 1)
    return int(rows * -(-per_row * _bits_for(largest) // 8))


def pack(x_seq: Tensor, largest: int) -> PackedTensor:
    """Pack a sequence `[T, *]` whose elements are integers from 0 to `largest` (at most 255).

    Example:
        >>> spikes = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
        >>> packed = pack(spikes, largest=1)
        >>> packed.data.dtype, torch.equal(unpack(packed), spikes)
        (torch.uint8, True)
    """
    cached = _packed_forms.get(x_seq)
    if cached is not None and cached[0] == x_seq._version and cached[1].largest == largest:
        return cached[1]  # type: ignore[no-any-return]
    T, order, bits = x_seq.shape[0], memory_order(x_seq), _bits_for(largest)
    rows = x_seq.shape[1] if _outermost_are_samples(order) else 1
    row, per_byte = x_seq.numel() // max(1, T * rows), 8 // bits
    data = torch.empty((T, rows, -(-row // per_byte)), dtype=torch.uint8, device=x_seq.device)
    for t, x in enumerate(in_order(x_seq.detach(), order).unbind(0)):
        # Step by step, so that temporaries stay small.
        flat = x.reshape(rows, row)
        if per_byte == 1:
            data[t].copy_(flat)
            continue
        groups = (flat if row % per_byte == 0 else F.pad(flat, (0, -row % per_byte))).view(-1, per_byte)
        data[t].view(-1).copy_(torch.mv(groups, _weights(bits, x.dtype, x.device)))
    packed = PackedTensor(data, x_seq.shape, order, x_seq.dtype, largest)
    _packed_forms[x_seq] = (x_seq._version, packed)
    return packed


def unpack(packed: PackedTensor) -> Tensor:
    """Unpack a tensor into its original memory format."""
    whole = empty_steps(packed.shape, packed.order, packed.dtype, packed.data.device)
    bits = _bits_for(packed.largest)
    elements, per_byte = _elements(bits, packed.dtype, packed.data.device), 8 // bits
    for x, data in zip(in_order(whole, packed.order).unbind(0), packed.data.unbind(0), strict=True):
        rows = data.shape[0]
        row = x.numel() // max(1, rows)
        if per_byte == 1:
            x.view(rows, row).copy_(data)
        elif row % per_byte == 0:
            torch.index_select(elements, 0, data.reshape(-1).int(), out=x.view(-1, per_byte))
        else:
            x.view(rows, row).copy_(elements[data.int()].view(rows, -1)[:, :row])
    return whole


def memory_order(x_seq: Tensor) -> tuple[int, ...]:
    """The dimensions of one step of `[T, *]`, from the outermost to the innermost in memory."""
    strides = x_seq.stride()[1:]
    # The stride of a batch of one sample says nothing: count it as outermost.
    first = 0 if strides and x_seq.shape[1] == 1 else None
    return tuple(sorted(range(len(strides)), key=lambda dim: (dim != first, -strides[dim])))


def in_order(x_seq: Tensor, order: Sequence[int]) -> Tensor:
    """View `[T, *]` with the dimensions of a step in this order."""
    return x_seq.permute(0, *(dim + 1 for dim in order))


def empty_steps(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised sequence `[T, *]` whose steps have their dimensions in this order in memory."""
    strides, step = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim + 1]
    return torch.empty_strided(tuple(shape), (step, *strides), dtype=dtype, device=device)
