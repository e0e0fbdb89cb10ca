"""The gradient of a weight over all steps, from the elements of its operand that are not zero."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.events.event_kernel import build, estimate_density
from snnfx.lowering.mixed.gradient_source import GRADIENTS
from snnfx.lowering.nonzero_lists import TILE_BYTES

__all__ = ["build_product_by_events", "product_by_events"]

_DTYPES = (torch.float32, torch.float64)

_LEAST_WORK = 1 << 22
"""Multiplications from which on the product saves more than its launch costs."""

_MOST_DENSE = 0.3
"""The density up to which the product is used; it was still faster at one half on the processor of the measurements."""


class _Arguments(ctypes.Structure):
    """The struct `Args` of `snnfx.lowering.mixed.gradient_source`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("x", "grad", "out", "rows", "inputs", "outputs", "x_step", "grad_step"),
            *("threads", "parallel", "next", "finite"),
        )
    ]


def build_product_by_events(dtype: torch.dtype) -> None:
    """Compile the kernels of the product and of the estimate of the density.

    Raises:
        LoweringRefused: one cannot be compiled.
    """
    if dtype in _DTYPES:
        build(dtype.itemsize)
        load(GRADIENTS[dtype.itemsize])


def product_by_events(x: Tensor, grad: Tensor) -> Tensor | None:
    """The sum over time of `grad_t^T x_t`; None if it is faster densely, or if `grad` is not finite.

    Args:
        x: `[T, N, K]`.
        grad: `[T, N, M]`.
    """
    outputs = grad.shape[2]
    if x.dtype not in _DTYPES or grad.dtype != x.dtype or x.numel() * outputs < _LEAST_WORK:
        return None
    rows = x.reshape(-1, x.shape[2]).contiguous()
    if estimate_density(rows) > _MOST_DENSE:
        return None
    total = _product(rows, grad.reshape(-1, outputs).contiguous())
    return None if total is None else total.mT.contiguous()


def _product(x: Tensor, grad: Tensor) -> Tensor | None:
    """`x^T grad`, `[K, M]`; None if `grad` is not finite, since zero times infinity is not zero."""
    out = x.new_zeros(x.shape[1], grad.shape[1])
    tiles = -(-grad.shape[1] * grad.element_size() // TILE_BYTES)
    runtime = openmp()
    arguments = _Arguments(
        x=x.data_ptr(),
        grad=grad.data_ptr(),
        out=out.data_ptr(),
        rows=x.shape[0],
        inputs=x.shape[1],
        outputs=grad.shape[1],
        x_step=x.stride(0),
        grad_step=grad.stride(0),
        threads=min(torch.get_num_threads(), tiles) if runtime else 1,
        parallel=runtime[0] if runtime else 0,
        finite=True,
    )
    load(GRADIENTS[x.dtype.itemsize]).run(ctypes.byref(arguments))
    return out if arguments.finite else None
