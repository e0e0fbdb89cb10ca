"""Max pooling by a kernel, as one node of the autograd graph.

torch keeps an index of 8 bytes for each maximum, fills the gradient with zeros and then scatters into it. The kernel
keeps one byte, and writes the gradient once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from snnfx.lowering.elementwise.cpp.build import builds
from snnfx.lowering.pooling.pool_kernel import Pair, is_channels_last, maxima, spread
from snnfx.lowering.pooling.pool_source import SOURCES
from snnfx.lowering.window_settings import integers
from snnfx.ops.batched_gradients import for_each_gradient

__all__ = ["max_pool"]

_MOST_ELEMENTS_OF_WINDOW = 256


def max_pool(
    x: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """As `torch.nn.functional.max_pool2d`, by a kernel where the windows do not overlap and have no padding.

    Args:
        x: `[N, C, H, W]`.
        kernel_size, stride, padding, dilation, ceil_mode: as for `max_pool2d`.

    Returns:
        `[N, C, H', W']`, in the memory format of `x`.
    """
    kernel = integers(kernel_size, 2, 1)
    steps = kernel if stride in (None, (), []) else integers(stride, 2, 1)
    is_plain = integers(padding, 2, 0) == (0, 0) and integers(dilation, 2, 1) == (1, 1) and not ceil_mode
    is_taken = kernel is not None and steps is not None and is_plain and _is_taken(x, kernel, steps)
    if is_taken and builds(SOURCES[x.element_size()], "max pooling runs in PyTorch"):
        assert kernel is not None and steps is not None
        if torch.is_grad_enabled() and x.requires_grad:
            return _MaxPool.apply(x, kernel, steps)  # type: ignore[no-any-return]
        return maxima(x, kernel, steps, with_positions=False)[0]
    return functional.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


def _is_taken(x: Tensor, kernel: Pair, stride: Pair) -> bool:
    """Whether the kernel takes these images and windows."""
    return (
        type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and x.dim() == 4
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not x.is_neg()
        and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        and all(1 <= k <= s for k, s in zip(kernel, stride, strict=True))
        and kernel[0] * kernel[1] <= _MOST_ELEMENTS_OF_WINDOW
        and kernel[0] <= x.shape[2]
        and kernel[1] <= x.shape[3]
    )


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair, stride: Pair) -> Tensor:
        y, positions = maxima(x, kernel, stride, with_positions=True)
        ctx.save_for_backward(positions)
        ctx.shape, ctx.last, ctx.windows = tuple(x.shape), is_channels_last(x), (kernel, stride)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (positions,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_spread(grad, positions, ctx.shape, ctx.last, *ctx.windows), None, None
        form = torch.channels_last if ctx.last else torch.contiguous_format

        def backward(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
            (given,) = grads
            assert given is not None
            return [spread(given.contiguous(memory_format=form), positions, ctx.shape, *ctx.windows)]

        (grad_x,) = for_each_gradient(backward, (grad,))
        return grad_x, None, None


def _differentiable_spread(
    grad: Tensor, positions: Tensor, shape: tuple[int, int, int, int], last: bool, kernel: Pair, stride: Pair
) -> Tensor:
    """The gradient of the images in differentiable operations, for create_graph=True."""
    N, C, H, W = shape
    out = grad.shape[2:]
    in_window = positions.view(N, *out, C).permute(0, 3, 1, 2) if last else positions.view(N, C, *out)
    tops = torch.arange(out[0], device=grad.device).view(-1, 1) * stride[0]
    lefts = torch.arange(out[1], device=grad.device) * stride[1]
    rows = tops + in_window.long() // kernel[1]
    places = rows * W + lefts + in_window.long() % kernel[1]
    return grad.new_zeros(N, C, H * W).scatter(2, places.flatten(2), grad.flatten(2)).view(N, C, H, W)
