"""Launch the kernel of products that visit only the inputs that are not zero."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.events.event_source import BLOCK_ROWS, CHECKSUM_PARTS, LONGEST, SOURCES
from snnfx.lowering.events.geometry import Geometry, Triple
from snnfx.lowering.events.spike_bits import SpikeBits
from snnfx.lowering.nonzero_lists import TILE_BYTES, VECTOR_BYTES
from snnfx.ops.buffer_pool import pool

__all__ = ["build", "checksum", "estimate_density", "fits_lists", "product", "product_of_bits", "weight_gradient"]

_UNITS_PER_THREAD = 4
"""Units of work for each thread, about, so that the load is balanced."""

_ROWS_OF_UNIT = 64
_LINES_SAMPLED = 192
"""Lines of 64 elements that the density is estimated from."""

_PARALLEL_BYTES = 1 << 19
"""Bytes of a weight from which on several threads compute its checksum."""

_BYTES_OF_PART = 1 << 19
"""Bytes of a gradient of the weight that each thread may have for itself: it stays in the L2 cache."""

_GEOMETRY_WORDS = 24


def build(itemsize: int) -> None:
    """Compile the kernel.

    Raises:
        LoweringRefused: it cannot be compiled.
    """
    load(SOURCES[itemsize])


def fits_lists(geometry: Geometry, channels: int) -> bool:
    """Whether the rows that one output pixel reads of a block can be numbered.

    Args:
        geometry: the settings of the layer.
        channels: input channels of a group.
    """
    columns, part = geometry.kernel[2], min(channels, 64)
    rows = max(part, BLOCK_ROWS // columns // part * part)
    return columns * rows <= LONGEST


def estimate_density(x: Tensor) -> float:
    """The fraction of elements that are not zero, from a sample, of a tensor that fills its memory."""
    words = _run(1, x, x.element_size(), elements=x.numel(), sampled=_LINES_SAMPLED, threads=1)
    active, seen = words[_AFTER_GEOMETRY + 5], words[_AFTER_GEOMETRY + 4]
    return active / seen if seen else 0.0


def checksum(weight: Tensor) -> bytes:
    """A hash of the memory of a tensor that fills it."""
    threads = _threads() if weight.nbytes >= _PARALLEL_BYTES else 1
    words = _run(2, weight, weight.element_size(), elements=weight.numel(), weight=weight, threads=threads)
    return bytes(words)[-8 * CHECKSUM_PARTS :]


def product_of_bits(spikes: SpikeBits, geometry: Geometry, outputs: int, packed: Tensor, bias: Tensor | None) -> Tensor:
    """The product of spikes `[T, N, *]` with packed weights, `[T * N, *]`; images are returned channels-last.

    Args:
        spikes: `[T, N, C, *]`, channels-last with a multiple of 64 channels in each group; `[T, N, *, C]` in the order
            of memory for a linear layer.
        geometry, outputs, packed, bias: as for `product`.
    """
    batch = spikes.shape[0] * spikes.shape[1]
    if geometry.dims == 0:
        lead = (batch, *spikes.shape[2:-1])
        images, size, channels = 1, (1, math.prod(lead), 1), spikes.shape[-1]
        shape: tuple[int, ...] = (*lead, outputs)
    else:
        d, h, w = (1,) * (3 - geometry.dims) + tuple(spikes.shape[3:])
        images, size, channels = batch, (d, h, w), spikes.shape[2] // geometry.groups
        shape = (images, *geometry.output_size(size)[3 - geometry.dims :], outputs)
    y = pool.empty(shape, _row_major(shape), spikes.dtype)
    _launch_product(None, spikes.words, geometry, images, size, channels, outputs, packed, bias, y)
    return y if geometry.dims == 0 else y.movedim(-1, 1)


def product(x: Tensor, geometry: Geometry, outputs: int, packed: Tensor, bias: Tensor | None) -> Tensor:
    """The product of an input with packed weights; the result has the memory format of the input.

    Args:
        x: `[N, C, *]`, or `[*, C]` for a linear layer.
        geometry: the settings of the layer.
        outputs: the number of output channels.
        packed: the weight, see `snnfx.lowering.events.packed_weights`.
        bias: contiguous, or None.
    """
    size, groups = geometry.size_of(x.shape), geometry.groups
    out = geometry.output_size(size)
    if geometry.dims == 0:
        x = x.contiguous()
        images, channels = 1, x.shape[-1]
        y = pool.empty((*x.shape[:-1], outputs), _row_major((*x.shape[:-1], outputs)), x.dtype)
        keeps_format = True
    else:
        keeps_format = _is_channels_last(x)
        last = x if keeps_format else x.movedim(1, -1).contiguous().movedim(-1, 1)
        images, channels = x.shape[0], x.shape[1] // groups
        shape = (images, *out[3 - geometry.dims :], outputs)
        y, x = pool.empty(shape, _row_major(shape), x.dtype).movedim(-1, 1), last
    _launch_product(x, None, geometry, images, size, channels, outputs, packed, bias, y)
    return y if keeps_format else y.contiguous()


def _launch_product(
    x: Tensor | None,
    bits: Tensor | None,
    geometry: Geometry,
    images: int,
    size: Triple,
    channels: int,
    outputs: int,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Run the kernel on an input of numbers or of bits."""
    itemsize = y.element_size()
    tiles = -(-(outputs // geometry.groups) // (TILE_BYTES // itemsize))
    out, threads = geometry.output_size(size), _threads()
    band, splits = _units(geometry, images, out[0] * out[1], tiles, threads)
    shape = _shape(geometry, images, size, channels, outputs, band, splits)
    _run(0, x, itemsize, weight=packed, bias=bias, y=y, shape=shape, threads=threads, bits=bits)


def weight_gradient(x: Tensor, geometry: Geometry, outputs: int, grad: Tensor) -> Tensor:
    """The gradient of the packed weight.

    Args:
        x, geometry, outputs: as for `product`.
        grad: the gradient of the output.
    """
    size, groups = geometry.size_of(x.shape), geometry.groups
    out = geometry.output_size(size)
    if geometry.dims == 0:
        x, grad, images, channels = x.contiguous(), grad.contiguous(), 1, x.shape[-1]
    else:
        images, channels = x.shape[0], x.shape[1] // groups
        x, grad = (t.movedim(1, -1).contiguous() for t in (x, grad))
    lanes, of_group = VECTOR_BYTES // x.element_size(), outputs // groups
    elements = groups * math.prod(geometry.kernel) * channels * (-(-of_group // lanes) * lanes)
    threads, tiles = _threads(), -(-of_group // (TILE_BYTES // x.element_size()))
    lines = out[0] * out[1]
    if elements * x.element_size() > _BYTES_OF_PART and tiles >= threads:
        band, splits, parts = min(max(lines, 1), _ROWS_OF_UNIT), threads, threads
        partial = x.new_zeros((1, elements))
    else:
        band, splits, parts = max(1, min(lines, _ROWS_OF_UNIT)), 1, threads
        partial = x.new_zeros((parts, elements))
    shape = _shape(geometry, images, size, channels, outputs, band, splits)
    _run(3, x, x.element_size(), weight=grad, y=partial, shape=shape, threads=threads, parts=parts)
    return partial.sum(0) if len(partial) > 1 else partial[0]


def _shape(
    geometry: Geometry, images: int, size: Sequence[int], channels: int, outputs: int, band: int, splits: int
) -> tuple[int, ...]:
    """The words of the struct that describe a product."""
    settings = *geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation
    sizes = images, *size, channels, geometry.groups, *geometry.output_size((size[0], size[1], size[2]))
    return *sizes, *settings, outputs // geometry.groups, band, splits


_AFTER_GEOMETRY = 5 + _GEOMETRY_WORDS


def _run(
    mode: int,
    x: Tensor | None,
    itemsize: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    shape: Sequence[int] = (0,) * _GEOMETRY_WORDS,
    threads: int,
    elements: int = 0,
    sampled: int = 0,
    parts: int = 0,
    bits: Tensor | None = None,
) -> ctypes.Array[ctypes.c_int64]:
    """Run the kernel with the struct `Args` as 64-bit words; returns the words after the run."""
    runtime = openmp() if threads > 1 else None
    addresses = [0 if t is None else t.data_ptr() for t in (x, weight, bias, y)]
    words = (mode, *addresses, *shape, threads, runtime[0] if runtime else 0, 0, elements, sampled, 0)
    words += (parts, 0 if bits is None else bits.data_ptr())
    arguments = (ctypes.c_int64 * (len(words) + CHECKSUM_PARTS))(*words)
    load(SOURCES[itemsize]).run(arguments)
    return arguments


def _threads() -> int:
    return torch.get_num_threads() if openmp() is not None else 1


def _units(geometry: Geometry, images: int, lines: int, tiles: int, threads: int) -> tuple[int, int]:
    """Lines of a unit of work, and parts into which the tiles of its outputs are divided."""
    if geometry.dims == 0:
        if lines < _ROWS_OF_UNIT * threads and tiles >= threads:
            return max(1, min(lines, _ROWS_OF_UNIT)), threads
        return max(1, min(_ROWS_OF_UNIT, -(-lines // (threads * 2)))), 1
    wanted = threads * _UNITS_PER_THREAD
    return max(1, -(-lines * min(images, wanted) // wanted)), 1


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _row_major(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]
