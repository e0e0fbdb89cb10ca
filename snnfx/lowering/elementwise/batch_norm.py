"""Decompose BatchNorm in evaluation mode, whose statistics are constants, into element-wise operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import LoweringRefused

__all__ = ["DECOMPOSITIONS"]


def _per_channel(x: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    """View each `[C]` as `[C, 1, ...]`, to broadcast with an input `[N, C, *]`."""
    shape = (-1, *(1,) * (x.dim() - 2))
    return [None if value is None else value.view(shape) for value in values]


def _inverse_deviation(variance: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.ops.aten.add.Scalar(variance, eps))


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if training or mean is None or variance is None:
        raise LoweringRefused("a BatchNorm in it takes the statistics of its input")
    mean, variance, weight, bias = _per_channel(x, mean, variance, weight, bias)
    assert mean is not None and variance is not None
    scale = _inverse_deviation(variance, eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return (x * scale + shift).to(x.dtype), x.new_empty(0), x.new_empty(0)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    saved_mean: Tensor | None,
    saved_inverse: Tensor | None,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if training or mean is None or variance is None:
        raise LoweringRefused("a BatchNorm in it takes the statistics of its input")
    mean, variance, weight = _per_channel(x, mean, variance, weight)
    assert mean is not None and variance is not None
    inverse = _inverse_deviation(variance, eps)
    scale = inverse if weight is None else inverse * weight
    samples = [dim for dim in range(x.dim()) if dim != 1]
    kind = inverse.dtype
    grad_x = (grad * scale).to(x.dtype) if wanted[0] else None
    grad_weight = ((x - mean) * inverse * grad).to(kind).sum(samples) if wanted[1] else None
    grad_bias = grad.to(kind).sum(samples) if wanted[2] else None
    return grad_x, grad_weight, grad_bias


def _forward_cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    return (*_forward(x, weight, bias, mean, variance, training, momentum, eps), x.new_empty(0))


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "native_batch_norm": _forward,
    "cudnn_batch_norm": _forward_cudnn,
    "native_batch_norm_backward": _backward,
}
"""Operator name -> decomposition; `aten_table.decomposition` prefers it to PyTorch's."""
