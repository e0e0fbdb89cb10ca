"""Weights in tiles of outputs, packed once for each change of the weight.

A packed weight has one row for each input of a tap, so that an active input adds one row of a tile. A weight is packed
again if another tensor, its version counter or its content differs. The counter misses writes of fused optimizers and
through `.data`, so a checksum of the whole content is compared as well.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from snnfx.lowering.events.event_kernel import checksum
from snnfx.lowering.events.event_source import BLOCK_ROWS
from snnfx.lowering.nonzero_lists import TILE_BYTES, VECTOR_BYTES

__all__ = ["PackedWeight", "pack", "packed_weight", "state_of", "unpack"]


@dataclass
class PackedWeight:
    """A packed weight with the state of the weight that it was packed from.

    Args:
        tiles: the packed weight.
        is_finite: whether all elements are finite: a kernel that skips zeros computes no `0 * inf`.
        state: address, version, strides and dtype of the weight.
        content: checksum of the weight.
    """

    tiles: Tensor
    is_finite: bool
    state: tuple[object, ...]
    content: bytes


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By the weight. Not stored in modules, so that it is not pickled or copied."""


def packed_weight(weight: Tensor, groups: int) -> PackedWeight:
    """The packed form of a weight that fills its memory.

    Args:
        weight: `[M, C / groups, *]`.
        groups: groups of channels.
    """
    state, content = (*state_of(weight), groups), checksum(weight)
    found: PackedWeight | None = _packed.get(weight)
    if found is None or found.state != state or found.content != content:
        with torch.inference_mode(False), torch.no_grad():
            tiles = pack(weight.detach(), groups)
            found = PackedWeight(tiles, bool(torch.isfinite(tiles).all()), state, content)
        _packed[weight] = found
    return found


def state_of(weight: Tensor) -> tuple[object, ...]:
    """The address, version and form of a weight; a write through `.data` changes none of them."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.shape, weight.stride(), weight.dtype, weight.device


def pack(weight: Tensor, groups: int) -> Tensor:
    """Pack a weight `[M, C / groups, *]`: by group and tile, rows `[taps * C / groups, outputs of the tile]`.

    Rows are ordered by block, column of the kernel, line of the kernel, channel.
    """
    lanes, full = VECTOR_BYTES // weight.element_size(), TILE_BYTES // weight.element_size()
    outputs = weight.shape[0] // groups
    rows = weight.reshape(groups, outputs, weight.shape[1], -1).permute(0, 3, 2, 1).flatten(1, 2)
    order = _order_of_rows(weight.shape)
    rows = rows if order is None else rows[:, order]
    rows = functional.pad(rows, (0, -outputs % lanes))
    whole = outputs // full * full
    tiles = rows[..., :whole].unflatten(2, (-1, full)).transpose(1, 2)
    return torch.cat((tiles.reshape(groups, -1), rows[..., whole:].reshape(groups, -1)), 1).flatten()


def unpack(packed: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """The inverse of `pack`, for a weight of a shape."""
    lanes, full = VECTOR_BYTES // packed.element_size(), TILE_BYTES // packed.element_size()
    outputs, taps = shape[0] // groups, shape[2:].numel()
    width = -(-outputs // lanes) * lanes
    whole, inputs = outputs // full * full, taps * shape[1]
    by_group = packed.view(groups, -1)
    tiles = by_group[:, : whole * inputs].unflatten(1, (whole // full, inputs, full)).transpose(1, 2).flatten(2)
    rest = by_group[:, whole * inputs :].unflatten(1, (inputs, width - whole))
    rows = torch.cat((tiles, rest), 2)[..., :outputs]
    order = _order_of_rows(shape)
    rows = rows if order is None else torch.empty_like(rows).index_copy_(1, order, rows)
    weight: Tensor = rows.unflatten(1, (taps, shape[1])).permute(0, 3, 2, 1).reshape(shape)
    return weight


@functools.cache
def _order_of_rows(shape: torch.Size) -> Tensor | None:
    """The number of each packed row among the rows in the order of tap and channel; None if that is its own."""
    if len(shape) == 2 or shape[-1] == 1:
        return None
    channels, columns, lines = shape[1], shape[-1], shape[2:-1].numel()
    words = -(-channels // 64)
    of_block = max(1, BLOCK_ROWS // (columns * min(channels, 64)))
    starts = [part // words * channels + part % words * 64 for part in range(0, lines * words, of_block)]
    numbers = torch.arange(lines * columns * channels, device="cpu").view(lines, columns, channels)
    by_column = numbers.transpose(0, 1).reshape(columns, -1)
    ends = [*starts[1:], lines * channels]
    return torch.cat([by_column[:, start:end].flatten() for start, end in zip(starts, ends, strict=True)])
