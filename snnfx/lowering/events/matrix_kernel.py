"""Launch the kernel of products of matrices whose first operand has many zeros."""

from __future__ import annotations

import ctypes
import math

from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import kernel_threads, load, parallel_fields
from snnfx.lowering.events.matrix_source import MATRIX_PRODUCTS
from snnfx.ops.buffer_pool import pool

__all__ = ["MOST_BATCH_DIMS", "build_matrix_products", "product_of_matrices"]

MOST_BATCH_DIMS = 3

_UNITS_PER_THREAD = 4
_FEWEST_ROWS = 16
"""Rows of a unit of work, at least: each unit reads the second matrix."""

_Triple = ctypes.c_int64 * MOST_BATCH_DIMS


class _Arguments(ctypes.Structure):
    """The struct `Args` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("a", "b", "y")),
        *((name, _Triple) for name in ("batch", "a_batch", "b_batch")),
        *((name, ctypes.c_int64) for name in ("M", "K", "N", "a_row", "a_column", "b_row", "b_column")),
        *((name, ctypes.c_int64) for name in ("counts", "rows", "threads", "parallel", "next", "refusal")),
    )


def build_matrix_products(itemsize: int) -> None:
    """Compile the kernel.

    Raises:
        LoweringRefused: it cannot be compiled.
    """
    load(MATRIX_PRODUCTS[itemsize])


def product_of_matrices(a: Tensor, b: Tensor, counts: bool) -> Tensor | None:
    """`a @ b`, row-major; None if `b` is not finite, because zeros of `a` would hide that.

    Args:
        a: `[*, M, K]`, of any strides, float32 or float64 on the CPU. At most 3 dimensions `*`.
        b: `[*, K, N]`, with the same sizes `*`.
        counts: whether `b` may have only ones and zeros.
    """
    *batch, M, K = a.shape
    N, images = b.shape[-1], math.prod(batch)
    shape = (*batch, M, N)
    y = pool.empty(shape, [math.prod(shape[i + 1 :]) for i in range(len(shape))], a.dtype)
    threads = kernel_threads()
    parts = -(-threads * _UNITS_PER_THREAD // max(images, 1))
    gap = MOST_BATCH_DIMS - len(batch)
    arguments = _Arguments(
        a=a.data_ptr(),
        b=b.data_ptr(),
        y=y.data_ptr(),
        batch=_Triple(*[1] * gap, *batch),
        a_batch=_Triple(*[0] * gap, *a.stride()[:-2]),
        b_batch=_Triple(*[0] * gap, *b.stride()[:-2]),
        M=M,
        K=K,
        N=N,
        a_row=a.stride(-2),
        a_column=a.stride(-1),
        b_row=b.stride(-2),
        b_column=b.stride(-1),
        counts=counts,
        rows=max(_FEWEST_ROWS, -(-M // parts)),
        **parallel_fields(threads),
    )
    load(MATRIX_PRODUCTS[a.element_size()]).run(ctypes.byref(arguments))
    return None if arguments.refusal else y
