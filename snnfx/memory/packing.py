"""Tensors of small whole numbers, stored in a bit or a byte an element.

A spike is 1 or 0 and takes four bytes: what is kept for the backward pass is packed, 32 or 4 times smaller, and
unpacked there. Exact for the values that `passes.whole_numbers` proves, and for no others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["PackedTensor", "empty_steps", "memory_order", "pack", "packed_bytes", "unpack"]


@functools.cache
def _weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value of each bit of a byte."""
    return torch.tensor([1 << bit for bit in range(8)], dtype=dtype, device=device)


@functools.cache
def _bits(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight elements that each of the 256 bytes stands for."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return bits.to(device=device, dtype=dtype)


_lately: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Packed forms of tensors that are still alive: two readers of one tensor share them."""


@dataclass(frozen=True)
class PackedTensor:
    """A sequence `[T, *]` of whole numbers from 0 to `largest`, one row of bytes for each time step.

    Args:
        data: `[T, ceil(n / 8)]` uint8 for `largest` 1, `[T, n]` uint8 up to 255.
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
        shape = torch.Size((len(range(*slice(start, stop).indices(self.shape[0]))), *self.shape[1:]))
        return PackedTensor(self.data[start:stop], shape, self.order, self.dtype, self.largest)


def packed_bytes(shape: torch.Size | tuple[int, ...], largest: int) -> int:
    """The bytes that a packed tensor of this shape takes."""
    each = 1
    for size in shape[1:]:
        each *= size
    return int(shape[0] * (-(-each // 8) if largest == 1 else each))


def pack(x_seq: Tensor, largest: int) -> PackedTensor:
    """Pack a sequence `[T, *]` whose elements are whole numbers from 0 to `largest` (at most 255).

    Example:
        >>> spikes = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
        >>> packed = pack(spikes, largest=1)
        >>> packed.data.numel(), torch.equal(unpack(packed), spikes)
        (2, True)
    """
    known = _lately.get(x_seq)
    if known is not None and known[0] == x_seq._version and known[1].largest == largest:
        return known[1]  # type: ignore[no-any-return]
    T, order = x_seq.shape[0], memory_order(x_seq)
    rows = x_seq.numel() // T
    data = torch.empty((T, rows if largest > 1 else -(-rows // 8)), dtype=torch.uint8, device=x_seq.device)
    for t, x in enumerate(in_order(x_seq.detach(), order).unbind(0)):
        # Step by step: what is needed on the way is small.
        if largest > 1:
            data[t].copy_(x.reshape(-1))
            continue
        row = x.reshape(-1)
        eights = (row if rows % 8 == 0 else F.pad(row, (0, -rows % 8))).view(-1, 8)
        data[t] = torch.mv(eights, _weights(x.dtype, x.device)).to(torch.uint8)
    packed = PackedTensor(data, x_seq.shape, order, x_seq.dtype, largest)
    _lately[x_seq] = (x_seq._version, packed)
    return packed


def unpack(packed: PackedTensor) -> Tensor:
    """The tensor again, in its memory format."""
    whole = empty_steps(packed.shape, packed.order, packed.dtype, packed.data.device)
    x_seq = in_order(whole, packed.order)
    if packed.largest > 1:
        x_seq.view(packed.data.shape).copy_(packed.data)
        return whole
    bits = _bits(packed.dtype, packed.data.device)
    for x, row in zip(x_seq.unbind(0), packed.data.unbind(0), strict=True):
        if x.numel() % 8 == 0:
            torch.index_select(bits, 0, row.int(), out=x.view(-1, 8))
        else:
            x.copy_(bits.index_select(0, row.int()).view(-1)[: x.numel()].view(x.shape))
    return whole


def memory_order(x_seq: Tensor) -> tuple[int, ...]:
    """The dimensions of one step of `[T, *]`, from the outermost to the innermost in memory."""
    strides = x_seq.stride()[1:]
    return tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))


def in_order(x_seq: Tensor, order: Sequence[int]) -> Tensor:
    """A view of `[T, *]` with the dimensions of a step in this order."""
    return x_seq.permute(0, *(dim + 1 for dim in order))


def empty_steps(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised sequence `[T, *]` with the dimensions of a step in this order in memory."""
    sizes = [shape[0], *(shape[dim + 1] for dim in order)]
    back = [order.index(dim) for dim in range(len(order))]
    return in_order(torch.empty(sizes, dtype=dtype, device=device), back)
