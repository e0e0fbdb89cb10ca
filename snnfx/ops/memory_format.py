"""Memory formats of images: channels-last for CPU convolutions, row-major for code that may look at strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.sandbox.torch_internals import is_batched_by_vmap

__all__ = ["channels_last", "image_format", "row_major", "stack_in_layout", "unbind_in_layout"]

_FORMATS_OF_THE_CPU = (torch.float32, torch.bfloat16, torch.float16)


def channels_last(x: Tensor) -> Tensor:
    """Images `[N, C, H, W]` on a CPU with the channels innermost in memory; everything else as it is.

    oneDNN's convolutions and torch's pooling take that format several times faster than row-major (`[N, C, H, W]` in
    this order in memory). The values are the same. Under torch.compile the choice is left to the compiler, under
    torch.vmap to torch. float64 has no such kernels.
    """
    if not _may_be_reformatted(x):
        return x
    if x.shape[1] == 1:
        # One channel is in either order: only its strides tell torch which one is meant.
        return x.contiguous().squeeze(1).unsqueeze(-1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def image_format(x: Tensor, weights: int) -> Tensor:
    """Images in the format in which a convolution is fastest.

    oneDNN brings weights into a format of its own at each call. From row-major weights, as modules have them, it takes
    longer for images that are channels-last; with more weights than elements of the images that decides: a third faster
    row-major for 512 channels of 2x2 pixels, forward and backward.

    Args:
        x: images `[N, C, H, W]`; everything else stays as it is.
        weights: elements of the convolution's weight.
    """
    return row_major(x) if _may_be_reformatted(x) and x.numel() < weights else channels_last(x)


def _may_be_reformatted(x: Tensor) -> bool:
    if (
        torch.compiler.is_compiling()
        or not isinstance(x, Tensor)
        or x.dim() != 4
        or x.device.type != "cpu"
        or x.dtype not in _FORMATS_OF_THE_CPU
    ):
        return False
    return not is_batched_by_vmap(x)


def row_major(x: Tensor) -> Tensor:
    """The value with its last dimension innermost in memory, as `view` and the caller expect it.

    A state that starts as a number or as None stays what it is.

    The gradient of images that are channels-last comes back channels-last: torch's max-pooling takes four times as long
    for a gradient that is row-major, and a kernel of neurons gathers it element by element.
    """
    if not isinstance(x, Tensor):
        return x
    if x.requires_grad and torch.is_grad_enabled() and _may_be_reformatted(x) and not x.is_contiguous():
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
    """The T steps of a sequence; of images that are channels-last, the gradient will be channels-last, too."""
    if x_seq.dim() != 5 or x_seq.is_contiguous() or x_seq.stride(2) != 1:
        return x_seq.unbind(0)
    return [x.permute(0, 3, 1, 2) for x in x_seq.permute(0, 1, 3, 4, 2).unbind(0)]


def stack_in_layout(steps: Sequence[Tensor]) -> Tensor:
    """`torch.stack` of T images `[N, C, H, W]` that keeps their memory format: `[T, N, C, H, W]`."""
    first = steps[0]
    if first.dim() == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
        return torch.stack([x.permute(0, 2, 3, 1) for x in steps]).permute(0, 1, 4, 2, 3)
    return torch.stack(tuple(steps))
