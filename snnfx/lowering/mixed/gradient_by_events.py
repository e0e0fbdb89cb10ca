"""The gradient of a weight over all steps, from the elements of its operand that are not zero."""

from __future__ import annotations

import torch
from torch import Tensor

from snnfx.lowering.events.event_kernel import build, estimate_density, weight_gradient
from snnfx.lowering.events.geometry import LINEAR
from snnfx.lowering.events.packed_weights import unpack

__all__ = ["build_product_by_events", "product_by_events"]

_DTYPES = (torch.float32, torch.float64)

_LEAST_WORK = 1 << 22
"""Multiplications from which on the product saves more than its launch costs."""

_MOST_DENSE = 0.2
"""The density up to which the product is faster: a third, measured, less a margin."""


def build_product_by_events(dtype: torch.dtype) -> None:
    """Compile the kernel of the products.

    Raises:
        LoweringRefused: it cannot be compiled.
    """
    if dtype in _DTYPES:
        build(dtype.itemsize)


def product_by_events(x: Tensor, grad: Tensor) -> Tensor | None:
    """The sum over time of `grad_t^T x_t`, or None if it is faster densely.

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
    packed = weight_gradient(rows, LINEAR, outputs, grad.reshape(-1, outputs))
    return unpack(packed, torch.Size((outputs, x.shape[2])), 1)
