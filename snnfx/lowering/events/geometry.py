"""The shape of a product: a convolution over up to three dimensions, or a linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from snnfx.lowering.window_settings import integers

__all__ = ["LINEAR", "Geometry", "Triple", "convolution"]

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """The settings of a convolution, with leading dimensions of size 1 up to three dimensions.

    Args:
        dims: number of spatial dimensions; 0 for a linear layer.
        kernel, stride, padding, dilation: by dimension.
        groups: groups of channels.
    """

    dims: int
    kernel: Triple = (1, 1, 1)
    stride: Triple = (1, 1, 1)
    padding: Triple = (0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: int = 1

    def output_size(self, size: Triple) -> Triple:
        """The spatial size of the output for a spatial size of the input."""
        settings = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        d, h, w = ((n + 2 * p - dil * (k - 1) - 1) // s + 1 for n, k, s, p, dil in settings)
        return d, h, w

    def size_of(self, shape: Sequence[int]) -> Triple:
        """The spatial size of an input of shape `[N, C, *]`, or of the rows of a linear layer."""
        if self.dims == 0:
            return 1, math.prod(shape[:-1]), 1
        d, h, w = (1,) * (3 - self.dims) + tuple(shape[2:])
        return d, h, w


LINEAR = Geometry(0)


def convolution(weight: Tensor, stride: object, padding: object, dilation: object, groups: int) -> Geometry | None:
    """The geometry of a convolution.

    Returns:
        None if its padding differs between the two sides, or torch refuses a setting.
    """
    dims = weight.dim() - 2
    if not 1 <= dims <= 3:
        return None
    steps, spread, kernel = integers(stride, dims, 1), integers(dilation, dims, 1), tuple(weight.shape[2:])
    if steps is None or spread is None or not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        return None
    margin: tuple[int, ...] | None
    if padding == "valid":
        margin = (0,) * dims
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        is_even = all(n % 2 == 0 for n in total) and all(s == 1 for s in steps)
        margin = tuple(n // 2 for n in total) if is_even else None
    else:
        margin = integers(padding, dims, 0)
    if margin is None:
        return None
    return Geometry(dims, _triple(kernel, 1), _triple(steps, 1), _triple(margin, 0), _triple(spread, 1), groups)


def _triple(values: tuple[int, ...], filler: int) -> Triple:
    d, h, w = (filler,) * (3 - len(values)) + values
    return d, h, w
