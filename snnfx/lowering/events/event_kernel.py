"""Launch the kernel of products that visit only the inputs that are not zero."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from enum import IntEnum

from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import kernel_threads, load, parallel_fields
from snnfx.lowering.events.event_source import BLOCK_ROWS, CHECKSUM_PARTS, LONGEST, SOURCES
from snnfx.lowering.events.geometry import Geometry, Triple
from snnfx.lowering.events.spike_bits import SpikeBits
from snnfx.lowering.nonzero_lists import TILE_BYTES, VECTOR_BYTES
from snnfx.ops.buffer_pool import pool

__all__ = [
    "ProductOfBits",
    "Refusal",
    "build",
    "checksum",
    "estimate_density",
    "fits_lists",
    "product",
    "weight_gradient",
]

_UNITS_PER_THREAD = 4
"""Units of work for each thread, about, so that the load is balanced."""

_ROWS_OF_UNIT = 64
_LINES_SAMPLED = 192
"""Lines of 64 elements that the density is estimated from."""

_PARALLEL_BYTES = 1 << 19
"""Bytes of a weight from which on several threads compute its checksum."""

_BYTES_OF_PART = 1 << 19
"""Bytes of a gradient of the weight that each thread may have for itself: it stays in the L2 cache."""


class Refusal(IntEnum):
    """Why a kernel refused a call; its results are then undefined."""

    NONE = 0
    TOO_DENSE = 1
    WEIGHT = 2
    GRADIENT = 3


_SHAPE = """
    images depth height width channels groups out_depth out_height out_width
    kernel_depth kernel_height kernel_width stride_depth stride_height stride_width
    padding_depth padding_height padding_width dilation_depth dilation_height dilation_width
    outputs band splits
""".split()
_Checksum = ctypes.c_int64 * CHECKSUM_PARTS


class _Arguments(ctypes.Structure):
    """The struct `Args` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("mode", "x", "weight", "bias", "y", *_SHAPE)),
        *((name, ctypes.c_int64) for name in ("threads", "parallel", "next", "elements", "sampled", "active")),
        *((name, ctypes.c_int64) for name in ("parts", "bits", "hashed", "bytes")),
        ("limit", ctypes.c_double),
        ("density", ctypes.c_double),
        ("refusal", ctypes.c_int64),
        ("checksum", _Checksum),
        ("expected", _Checksum),
    )


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
    arguments = _Arguments(mode=1, x=x.data_ptr(), elements=x.numel(), sampled=_LINES_SAMPLED)
    load(SOURCES[x.element_size()]).run(ctypes.byref(arguments))
    return arguments.active / arguments.sampled if arguments.sampled else 0.0


def checksum(weight: Tensor) -> bytes:
    """A hash of the memory of a tensor that fills it."""
    arguments = _Arguments(mode=2, hashed=weight.data_ptr(), bytes=weight.nbytes)
    _run(arguments, weight.element_size(), kernel_threads() if weight.nbytes >= _PARALLEL_BYTES else 1)
    return bytes(arguments.checksum)


class ProductOfBits:
    """The product of spikes `[T, N, *]` of one shape with packed weights, `[T * N, *]`; images are channels-last.

    Args:
        spikes: an example: `[T, N, C, *]`, channels-last with a multiple of 64 channels in each group; `[T, N, *, C]`
            in the order of memory for a linear layer.
        geometry: the settings of the layer.
        weight: the weight; `Refusal.WEIGHT` once its content has changed.
        tiles, content: the packed weight, and the checksum of the weight that it was packed from.
    """

    def __init__(self, spikes: SpikeBits, geometry: Geometry, weight: Tensor, tiles: Tensor, content: bytes) -> None:
        outputs = weight.shape[0]
        batch, self.dtype, self.is_image = spikes.shape[0] * spikes.shape[1], spikes.dtype, geometry.dims > 0
        if self.is_image:
            d, h, w = (1,) * (3 - geometry.dims) + tuple(spikes.shape[3:])
            images, size, channels = batch, (d, h, w), spikes.shape[2] // geometry.groups
            self.shape: tuple[int, ...] = (images, *geometry.output_size(size)[3 - geometry.dims :], outputs)
        else:
            lead = (batch, *spikes.shape[2:-1])
            images, size, channels = 1, (1, math.prod(lead), 1), spikes.shape[-1]
            self.shape = (*lead, outputs)
        self.stride = _row_major(self.shape)
        self.threads = kernel_threads()
        self._run = load(SOURCES[self.dtype.itemsize]).run
        shape = _shape_of_product(geometry, images, size, channels, outputs, self.dtype.itemsize, self.threads)
        self._arguments = _Arguments(
            mode=4,
            elements=spikes.words.numel(),
            weight=tiles.data_ptr(),
            hashed=weight.data_ptr(),
            bytes=weight.nbytes,
            expected=_Checksum.from_buffer_copy(content),
            **shape,
            **parallel_fields(self.threads),
        )
        self._tiles = tiles

    def __call__(self, words: Tensor, bias: Tensor | None, limit: float) -> tuple[int, float, Tensor]:
        """Why the call was refused, the density of the spikes, and the product.

        Args:
            words: the bits of the spikes.
            bias: contiguous, or None.
            limit: `Refusal.TOO_DENSE` if the density of the spikes is not lower.
        """
        y = pool.empty(self.shape, self.stride, self.dtype)
        arguments = _Arguments.from_buffer_copy(self._arguments)
        arguments.y, arguments.bits, arguments.limit = y.data_ptr(), words.data_ptr(), limit
        if bias is not None:
            arguments.bias = bias.data_ptr()
        self._run(ctypes.byref(arguments))
        return arguments.refusal, arguments.density, y.movedim(-1, 1) if self.is_image else y


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
    threads, itemsize = kernel_threads(), y.element_size()
    shape_of_product = _shape_of_product(geometry, images, size, channels, outputs, itemsize, threads)
    arguments = _Arguments(x=x.data_ptr(), weight=packed.data_ptr(), y=y.data_ptr(), **shape_of_product)
    if bias is not None:
        arguments.bias = bias.data_ptr()
    _run(arguments, itemsize, threads)
    return y if keeps_format else y.contiguous()


def weight_gradient(x: Tensor, geometry: Geometry, outputs: int, grad: Tensor) -> Tensor | None:
    """The gradient of the packed weight; None if `grad` is not finite, since zero times infinity is not zero.

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
    threads, tiles = kernel_threads(), -(-of_group // (TILE_BYTES // x.element_size()))
    lines = out[0] * out[1]
    if elements * x.element_size() > _BYTES_OF_PART and tiles >= threads:
        band, splits, parts = min(max(lines, 1), _ROWS_OF_UNIT), threads, threads
        partial = x.new_zeros((1, elements))
    else:
        band, splits, parts = max(1, min(lines, _ROWS_OF_UNIT)), 1, threads
        partial = x.new_zeros((parts, elements))
    shape = _shape(geometry, images, size, channels, outputs, band, splits)
    arguments = _Arguments(mode=3, x=x.data_ptr(), weight=grad.data_ptr(), y=partial.data_ptr(), parts=parts, **shape)
    arguments.elements = grad.numel()
    _run(arguments, x.element_size(), threads)
    if arguments.refusal == Refusal.GRADIENT:
        return None
    return partial.sum(0) if len(partial) > 1 else partial[0]


def _shape(
    geometry: Geometry, images: int, size: Triple, channels: int, outputs: int, band: int, splits: int
) -> dict[str, int]:
    """The fields of the struct that describe a product."""
    settings = *geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation
    sizes = images, *size, channels, geometry.groups, *geometry.output_size(size)
    return dict(zip(_SHAPE, (*sizes, *settings, outputs // geometry.groups, band, splits), strict=True))


def _shape_of_product(
    geometry: Geometry, images: int, size: Triple, channels: int, outputs: int, itemsize: int, threads: int
) -> dict[str, int]:
    """The fields of the struct that describe a forward pass, divided among threads."""
    tiles = -(-(outputs // geometry.groups) // (TILE_BYTES // itemsize))
    out = geometry.output_size(size)
    band, splits = _units(geometry, images, out[0] * out[1], tiles, threads)
    return _shape(geometry, images, size, channels, outputs, band, splits)


def _run(arguments: _Arguments, itemsize: int, threads: int) -> None:
    for name, value in parallel_fields(threads).items():
        setattr(arguments, name, value)
    load(SOURCES[itemsize]).run(ctypes.byref(arguments))


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
