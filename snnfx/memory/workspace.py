"""What operations take while they run, besides their results. Measured (peak RSS of single calls, torch 2.13, one CPU).

oneDNN's convolutions reorder row-major operands into blocks: forward takes the larger of input and output once more,
backward twice. Images whose channels are innermost in memory are taken as they are. In float64, and for other devices,
nothing is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["workspace_on"]

_REORDERED = (torch.float32, torch.bfloat16)


def workspace_on(device: torch.device, memory_format: str | None) -> Callable[[Any, Sequence[Any], Any], int]:
    """`(operation, arguments, result) -> bytes` for calls on a device, with a net's choice of memory format."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return lambda *_: 0

    def workspace(func: Any, args: Sequence[Any], result: Any) -> int:
        if func is torch.ops.aten.convolution.default:
            x, y = args[0], result
            larger = max(_bytes(x), _bytes(y))
        elif func is torch.ops.aten.convolution_backward.default:
            x, y = args[1], args[0]
            larger = 2 * max(_bytes(x), _bytes(y)) if x.shape[1] >= 8 else _bytes(y)
        else:
            return 0
        as_it_is = memory_format is not None and x.dim() == 4
        return larger if x.dtype in _REORDERED and not as_it_is else 0

    return workspace


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
