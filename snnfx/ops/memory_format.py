"""Convert images between memory formats: channels-last for CPU convolutions, row-major for other code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.sandbox.torch_internals import are_transforms_active, is_batched_by_autograd, is_batched_by_vmap

__all__ = [
    "channels_last",
    "image_format",
    "may_be_reformatted",
    "row_major",
    "stack_in_layout",
    "to_channels_last",
    "unbind_in_layout",
]

_CHANNELS_LAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def channels_last(x: Tensor) -> Tensor:
    """Convert CPU images `[N, C, H, W]` to channels-last; return everything else unchanged.

    oneDNN's convolutions and torch's pooling are several times faster in this format than in row-major. Values do not
    change. Under torch.compile the compiler chooses the format, under torch.vmap torch does. float64 has no
    channels-last kernels.
    """
    return to_channels_last(x) if may_be_reformatted(x) else x


def to_channels_last(x: Tensor) -> Tensor:
    """Convert images `[N, C, H, W]` to channels-last."""
    if x.shape[1] == 1:
        # With one channel, the strides alone determine the memory format that torch detects.
        return x.contiguous().squeeze(1).unsqueeze(-1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def image_format(x: Tensor, weights: int) -> Tensor:
    """Convert images to the memory format in which a convolution is fastest.

    oneDNN reorders the weights at each call, which takes longer from row-major weights (as modules store them) for
    channels-last images. With more weights than image elements this dominates: for 512 channels of 2x2 pixels,
    row-major is a third faster, forward and backward.

    Args:
        x: images `[N, C, H, W]`; everything else is returned unchanged.
        weights: number of elements of the convolution's weight.
    """
    if not may_be_reformatted(x):
        return x
    return row_major(x) if x.numel() < weights else to_channels_last(x)


def may_be_reformatted(x: Tensor) -> bool:
    """Whether a value is a batch of images on the CPU whose memory format may be changed now."""
    if (
        torch.compiler.is_compiling()
        or not isinstance(x, Tensor)
        or x.dim() != 4
        or x.device.type != "cpu"
        or x.dtype not in _CHANNELS_LAST_DTYPES
    ):
        return False
    return not (is_batched_by_vmap(x) or is_batched_by_autograd(x))


def row_major(x: Tensor) -> Tensor:
    """Convert a tensor to row-major (contiguous), as `view` and the caller require; numbers and None are unchanged.

    The gradient of channels-last images is returned channels-last: torch's max-pooling takes four times as long for a
    row-major gradient, and a neuron kernel would gather it element by element.
    """
    if not isinstance(x, Tensor):
        return x
    is_differentiated = x.requires_grad and torch.is_grad_enabled() and not are_transforms_active()
    if is_differentiated and may_be_reformatted(x) and not x.is_contiguous():
        return _RowMajor.apply(x)  # type: ignore[no-any-return]
    return x.contiguous()


class _RowMajor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return channels_last(grad) if ctx.is_channels_last else grad


def unbind_in_layout(x_seq: Tensor) -> Sequence[Tensor]:
    """`x_seq.unbind(0)` that keeps channels-last images channels-last, also in the gradient."""
    if x_seq.dim() != 5 or x_seq.is_contiguous() or x_seq.stride(2) != 1:
        return x_seq.unbind(0)
    return [x.permute(0, 3, 1, 2) for x in x_seq.permute(0, 1, 3, 4, 2).unbind(0)]


def stack_in_layout(steps: Sequence[Tensor]) -> Tensor:
    """`torch.stack` of T images `[N, C, H, W]` that keeps their memory format; returns `[T, N, C, H, W]`."""
    first = steps[0]
    if first.dim() == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
        return torch.stack([x.permute(0, 2, 3, 1) for x in steps]).permute(0, 1, 4, 2, 3)
    return torch.stack(tuple(steps))
