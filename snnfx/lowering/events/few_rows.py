"""Products of few rows with a weight that is read where it lies, by the rows' elements that are not zero."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import kernel_threads, load, parallel_fields
from snnfx.lowering.events.few_rows_source import BLOCK, FEW_ROWS
from snnfx.lowering.nonzero_lists import TILE_BYTES

__all__ = ["FewRowsOfBits", "build_few_rows", "has_few_rows", "product_of_few_rows"]

_MOST_ROWS, _MOST_ROWS_OF_LARGE = 63, 255
"""With more rows, a packed weight is faster; comparing a large one with its packed form takes as long as reading it."""

_LARGE_BYTES = 1 << 23

_MOST_TRAINED_ROWS = 1023
"""In training a weight changes at each step of an optimizer, so that packing it pays only for more rows than these."""

_UNITS = 4
"""Units of work, at least, so that few outputs are computed by several threads."""


def build_few_rows(itemsize: int) -> None:
    """Compile the kernel.

    Raises:
        LoweringRefused: it cannot be compiled.
    """
    load(FEW_ROWS[itemsize])


def has_few_rows(rows: int, weight: Tensor, in_training: bool = False) -> bool:
    """Whether a linear layer is read where it lies: a row-major weight `[M, K]`, for few rows."""
    in_inference = _MOST_ROWS_OF_LARGE if weight.nbytes >= _LARGE_BYTES else _MOST_ROWS
    return rows <= (_MOST_TRAINED_ROWS if in_training else in_inference) and weight.is_contiguous()


class _Arguments(ctypes.Structure):
    """The struct `Args` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("x", "bits", "weight", "bias", "y", "rows", "K", "M", "parts")),
        *((name, ctypes.c_int64) for name in ("threads", "parallel", "next")),
        ("limit", ctypes.c_double),
        ("density", ctypes.c_double),
        ("refusal", ctypes.c_int64),
    )

    @staticmethod
    def of(rows: int, weight: Tensor) -> _Arguments:
        """The arguments of a product with a weight, without its addresses."""
        outputs, inputs = weight.shape
        tiles = -(-outputs // (TILE_BYTES // weight.element_size()))
        parts = max(1, min(_UNITS // tiles, inputs // BLOCK))  # of any number of threads: the order of sums stays
        return _Arguments(rows=rows, K=inputs, M=outputs, parts=parts, **parallel_fields(kernel_threads()))


def product_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`torch.nn.functional.linear(x, weight, bias)`; None if the weight is not finite.

    Args:
        x: `[*, K]`.
        weight: `[M, K]`, see `has_few_rows`.
        bias: `[M]`, contiguous, or None.
    """
    x, rows = x.contiguous(), math.prod(x.shape[:-1])
    arguments = _Arguments.of(rows, weight)
    arguments.x = x.data_ptr()
    y = _launch(arguments, rows, weight, bias)
    return None if arguments.refusal else y.view(*x.shape[:-1], -1)


class FewRowsOfBits:
    """The product of spikes `[T, N, *, K]` of one shape, row-major, with a weight.

    Args:
        shape: the shape of the spikes; K is a multiple of 64.
        weight: see `has_few_rows`.
    """

    def __init__(self, shape: tuple[int, ...], weight: Tensor) -> None:
        self.shape, self.rows = (shape[0] * shape[1], *shape[2:-1], len(weight)), math.prod(shape[:-1])
        self.weight, self._arguments = weight, _Arguments.of(self.rows, weight)

    def __call__(self, words: Tensor, bias: Tensor | None, limit: float) -> tuple[int, float, Tensor]:
        """Why the call was refused, the density of the spikes, and the product `[T * N, *, M]`.

        Args:
            words: the bits of the spikes.
            bias: `[M]`, contiguous, or None.
            limit: `Refusal.TOO_DENSE` if the density of the spikes is not lower; `Refusal.WEIGHT` if the weight is
                not finite.
        """
        arguments = _Arguments.from_buffer_copy(self._arguments)
        arguments.bits, arguments.limit = words.data_ptr(), limit
        y = _launch(arguments, self.rows, self.weight, bias)
        return arguments.refusal, arguments.density, y.view(self.shape)


def _launch(arguments: _Arguments, rows: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run the kernel; returns the product `[rows, M]`, which is undefined if the arguments have a refusal."""
    parts = arguments.parts
    y = torch.empty((parts, rows, len(weight)), dtype=weight.dtype, device="cpu")
    arguments.weight, arguments.y = weight.data_ptr(), y.data_ptr()
    if bias is not None:
        arguments.bias = bias.data_ptr()
    load(FEW_ROWS[weight.element_size()]).run(ctypes.byref(arguments))
    return y.sum(0) if parts > 1 else y[0]
