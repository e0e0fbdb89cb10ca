"""The gradient of the weight of a small convolution, summed over all steps.

Its cost is that of a few microseconds of arithmetic, less than a call of PyTorch. The library of compiled loops has the
kernel, so that nothing else is compiled.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load
from snnfx.lowering.mixed.convolution_calls import Settings
from snnfx.lowering.mixed.loop_arguments import weight_gradient_arguments
from snnfx.lowering.mixed.loop_source import LOOPS

__all__ = ["small_weight_gradient"]

_DTYPES = (torch.float32, torch.float64)

_LARGEST_WORK = 1 << 22
"""Multiplications up to which the kernel, which runs in one thread, was measured to be faster than PyTorch."""


def small_weight_gradient(settings: Settings, grad: Tensor, x: Tensor, shape: torch.Size) -> Tensor | None:
    """The sum over time of the gradient of a weight; None if PyTorch computes it faster.

    Args:
        settings: the settings of the convolution.
        grad: the gradient of its result, `[T, N, C, *]`.
        x: its input, `[T, N, C, *]`.
        shape: the shape of the weight.
    """
    is_known = x.dtype in _DTYPES and grad.dtype == x.dtype and not settings.is_reversed and not settings.is_swapped
    if not is_known or not grad.numel() or not x.numel() or grad.numel() * math.prod(shape[1:]) > _LARGEST_WORK:
        return None
    grad, x = grad.resolve_neg().contiguous(), x.resolve_neg()
    gradient = torch.zeros(shape, dtype=x.dtype)
    arguments, alive = weight_gradient_arguments(settings, x, grad, gradient)
    load(LOOPS[x.element_size()]).run(ctypes.byref(arguments))
    del alive
    return gradient
