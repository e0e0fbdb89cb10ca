"""Workspace: the memory that operations allocate besides their results.

Measured as the peak RSS of single calls (torch 2.13, one CPU). oneDNN's convolutions reorder row-major operands into
blocks: forward allocates another copy of the larger of input and output, and one of the weight; backward two copies of
the larger, or one of the weight if that is more. Channels-last images are not copied, but the weight is reordered,
twice in forward and three times in backward. In float64, and on other devices, the workspace counts as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Workspace"]

_REORDERED = (torch.float32, torch.bfloat16)


class Workspace:
    """Predict the workspace of an operation on meta tensors: `(operation, arguments, result) -> block sizes in bytes`.

    Args:
        device: the device of the real run.
        scale: how many times more elements images have in the real run.

    Attributes:
        reformats: whether images are converted to the fastest format for a convolution: channels-last, unless the
            weight has more elements than the images (`snnfx.ops.memory_format.image_format`).
    """

    def __init__(self, device: torch.device, scale: float = 1.0) -> None:
        self.is_counted = device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.scale, self.reformats = scale, False

    def __call__(self, func: Any, args: Sequence[Any], result: Any) -> Sequence[int]:
        if not self.is_counted:
            return ()
        if func is torch.ops.aten.convolution.default:
            x, y, weight = args[0], result, args[1]
            if x.dtype not in _REORDERED:
                return ()
            if self._is_channels_last(x, weight):
                return (2 * _bytes(weight),)
            return max(_bytes(x), _bytes(y)), _bytes(weight)
        if func is torch.ops.aten.convolution_backward.default:
            y, x, weight = args[0], args[1], args[2]
            if x.dtype not in _REORDERED:
                return ()
            if self._is_channels_last(x, weight):
                return (3 * _bytes(weight),)
            images = 2 * max(_bytes(x), _bytes(y)) if x.shape[1] >= 8 else _bytes(y)
            return (max(images, _bytes(weight)),)
        return ()

    def _is_channels_last(self, x: Tensor, weight: Tensor) -> bool:
        if x.dim() != 4:
            return False
        if self.reformats:
            return x.numel() * self.scale >= weight.numel()
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
