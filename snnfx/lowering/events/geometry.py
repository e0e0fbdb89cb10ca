"""The shape of a product: a convolution over up to three dimensions, or a linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

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


def convolution(
    weight: Tensor,
    stride: int | tuple[int, ...],
    padding: int | str | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
) -> Geometry | None:
    """The geometry of a convolution; None if its padding differs between the two sides."""
    dims = weight.dim() - 2
    steps, spread = _triple(stride, dims, 1), _triple(dilation, dims, 1)
    kernel = _triple(tuple(weight.shape[2:]), dims, 1)
    if padding == "valid":
        margin = (0, 0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        if any(n % 2 for n in total):
            return None
        margin = total[0] // 2, total[1] // 2, total[2] // 2
    else:
        assert not isinstance(padding, str)
        margin = _triple(padding, dims, 0)
    return Geometry(dims, kernel, steps, margin, spread, groups)


def _triple(value: int | tuple[int, ...], dims: int, filler: int) -> Triple:
    values = (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
    d, h, w = (filler,) * (3 - dims) + values
    return d, h, w
