"""Launch the passes over the channels of a batch: statistics, and the gradient through them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from snnfx.lowering.batch_norm.channel_source import SOURCES
from snnfx.lowering.elementwise.cpp.build import load, openmp

__all__ = ["add_gradient_of_statistics", "channel_statistics"]

_PARALLEL_ELEMENTS = 1 << 15
"""Elements of a batch from which on several threads pay."""

_MOST_PARTS = 64

Running = tuple[Tensor, Tensor]
"""The running mean and variance."""


def channel_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running | None, factor: float, eps: float
) -> Tensor:
    """The factors of the normalisation of a batch `[N, C, *]`; updates the running mean and variance.

    Args:
        x: row-major or channels-last, float32 or float64.
        weight, bias: `[C]`, contiguous, of the same dtype; None: ones, zeros.
        running: the running mean and variance, contiguous, of the same dtype; None: there are none to update.
        factor: the weight of the new statistics in the running ones.
        eps: of the BatchNorm.

    Returns:
        `[4, C]`: the mean; the scale, `weight / sqrt(variance + eps)`; the bias; and `1 / sqrt(variance + eps)`. The
        variance is the biased one.

    Raises:
        LoweringRefused: the kernel cannot be compiled.
    """
    outer, channels, inner = _layout(x)
    threads, parts = _threads_and_parts(x, outer if inner == 1 else channels)
    factors = x.new_empty((4, channels))
    partial = torch.empty(2 * channels * (parts if inner == 1 else 1), dtype=torch.float64, device="cpu")
    given = {"weight": weight, "bias": bias, "partial": partial}
    if running is not None:
        given |= {"running_mean": running[0], "running_var": running[1]}
    _run(0, x, factors, given, (outer, channels, inner), (factor, eps), threads, parts)
    return factors


def add_gradient_of_statistics(
    grad: Tensor | None, x: Tensor, factors: Tensor, of_scale: Tensor | None, of_bias: Tensor | None, with_weight: bool
) -> Tensor | None:
    """Add the gradient through the statistics to the gradient of a batch, in place.

    Args:
        grad: as `x`, with the same memory format; None: only the gradient of the weight is wanted.
        x: `[N, C, *]`, row-major or channels-last.
        factors: the result of `channel_statistics`.
        of_scale, of_bias: the gradients of scale and bias, `[C]`, contiguous; None: zero.
        with_weight: whether the gradient of the weight is wanted.

    Returns:
        The gradient of the weight, `[C]`, or None.
    """
    outer, channels, inner = _layout(x)
    threads, parts = _threads_and_parts(x, outer if inner == 1 else outer * channels)
    of_weight = x.new_empty(channels) if with_weight and of_scale is not None else None
    given = {"grad": grad, "of_scale": of_scale, "of_bias": of_bias, "of_weight": of_weight}
    if grad is None:
        threads, parts = 1, 0
    _run(1, x, factors, given, (outer, channels, inner), (0.0, 0.0), threads, parts)
    return of_weight


def _layout(x: Tensor) -> tuple[int, int, int]:
    """Rows, channels and elements of a channel in a row of the memory of `[N, C, *]`."""
    samples, channels = x.shape[:2]
    inner = x.numel() // max(1, samples * channels)
    return (samples, channels, inner) if x.is_contiguous() else (samples * inner, channels, 1)


def _threads_and_parts(x: Tensor, lines: int) -> tuple[int, int]:
    threads = torch.get_num_threads() if openmp() is not None and x.numel() >= _PARALLEL_ELEMENTS else 1
    return threads, max(1, min(threads, lines, _MOST_PARTS))


class _Args(ctypes.Structure):
    """The struct `Args` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("mode", "x", "grad", "outer", "channels", "inner", "mean", "scale")),
        *((name, ctypes.c_int64) for name in ("shift", "inverse", "weight", "bias", "running_mean", "running_var")),
        ("factor", ctypes.c_double),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("of_scale", "of_bias", "of_weight", "partial", "parts", "threads")),
        *((name, ctypes.c_int64) for name in ("parallel", "next")),
    ]


def _run(
    mode: int,
    x: Tensor,
    factors: Tensor,
    given: dict[str, Tensor | None],
    sizes: tuple[int, int, int],
    numbers: tuple[float, float],
    threads: int,
    parts: int,
) -> None:
    runtime = openmp() if threads > 1 else None
    arguments = _Args(mode=mode, x=x.data_ptr(), parts=parts, threads=threads)
    arguments.outer, arguments.channels, arguments.inner = sizes
    arguments.factor, arguments.eps = numbers
    row = sizes[1] * x.element_size()
    for number, name in enumerate(("mean", "scale", "shift", "inverse")):
        setattr(arguments, name, factors.data_ptr() + number * row)
    for name, tensor in given.items():
        if tensor is not None:
            setattr(arguments, name, tensor.data_ptr())
    arguments.parallel = runtime[0] if runtime else 0
    load(SOURCES[x.element_size()]).run(ctypes.byref(arguments))
