"""Launch max pooling and its backward pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.pooling.pool_source import SOURCES
from snnfx.ops.buffer_pool import pool

__all__ = ["is_channels_last", "maxima", "spread"]

_PARALLEL_ELEMENTS = 1 << 15
"""Elements of the images from which on several threads pay."""

_PARTS_PER_THREAD = 4
Pair = tuple[int, ...]


def is_channels_last(x: Tensor) -> bool:
    """Whether images `[N, C, H, W]` have their channels last in memory, and not row-major memory as well."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def maxima(x: Tensor, kernel: Pair, stride: Pair, with_positions: bool) -> tuple[Tensor, Tensor | None]:
    """The maximum of each window, and its position in the window.

    Args:
        x: `[N, C, H, W]`, row-major or channels-last, float32 or float64.
        kernel, stride: of the windows, which do not overlap.
        with_positions: whether to return the positions.

    Returns:
        `[N, C, H', W']` in the memory format of `x`, and the positions as uint8 in the order of the result in memory.

    Raises:
        LoweringRefused: the kernel cannot be compiled.
    """
    N, C, H, W = x.shape
    out = (H - kernel[0]) // stride[0] + 1, (W - kernel[1]) // stride[1] + 1
    channels = C if is_channels_last(x) else 1
    y = _images((N, C, *out), channels > 1, x.dtype)
    positions = torch.empty(y.numel(), dtype=torch.uint8, device="cpu") if with_positions else None
    _run(0, x, y, positions, channels, kernel, stride)
    return y, positions


def spread(grad: Tensor, positions: Tensor, shape: tuple[int, int, int, int], kernel: Pair, stride: Pair) -> Tensor:
    """The gradient of the images from the gradient of the maxima.

    Args:
        grad: in the memory format that `maxima` returned.
        positions: the result of `maxima`.
        shape: of the images.
        kernel, stride: as for `maxima`.
    """
    last = is_channels_last(grad)
    grad_x = _images(shape, last, grad.dtype)
    _run(1, grad_x, grad, positions, shape[1] if last else 1, kernel, stride)
    return grad_x


def _images(shape: tuple[int, int, int, int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    _, C, H, W = shape
    return pool.empty(shape, (C * H * W, 1, W * C, C) if channels_last else (C * H * W, H * W, W, 1), dtype)


class _Args(ctypes.Structure):
    """The struct `Args` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("mode", "x", "y", "position", "images", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "kernel_0", "kernel_1", "stride_0")),
        *((name, ctypes.c_int64) for name in ("stride_1", "threads", "parts", "parallel", "next")),
        ("offset", ctypes.c_int64 * 256),
    ]


def _run(mode: int, x: Tensor, y: Tensor, positions: Tensor | None, channels: int, kernel: Pair, stride: Pair) -> None:
    N, C, H, W = x.shape
    images, out_height = (N if channels > 1 else N * C), y.shape[2]
    threads = torch.get_num_threads() if openmp() is not None and x.numel() >= _PARALLEL_ELEMENTS else 1
    runtime = openmp() if threads > 1 else None
    address = 0 if positions is None else positions.data_ptr()
    parts = max(1, min(threads * _PARTS_PER_THREAD, images * out_height)) if threads > 1 else 1
    sizes = (images, H, W, channels, out_height, y.shape[3], *kernel, *stride)
    arguments = _Args(mode, x.data_ptr(), y.data_ptr(), address, *sizes, threads, parts, runtime[0] if runtime else 0)
    load(SOURCES[x.element_size()]).run(ctypes.byref(arguments))
