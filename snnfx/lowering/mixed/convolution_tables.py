"""The positions that a convolution of a compiled loop reads and writes, computed once for its shapes.

A sample of the input is copied to an extended image with padding. The elements whose positions are equal modulo the
stride lie together, so that consecutive results always read consecutive elements: each term of a vector of results is
an element of the weight times a vector of the extended image.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snnfx.lowering.mixed.convolution_calls import Settings, Sizes

__all__ = ["ConvolutionTables", "convolution_tables"]

_MOST_WASTE = 1.15
"""Vectors of the rows of the result, relative to vectors across rows, up to which rows are written directly."""


@dataclass(frozen=True)
class ConvolutionTables:
    """Positions of elements, int64.

    Args:
        plane: elements of a channel of the extended image.
        offsets: the position of each term, by channel of the group and element of the kernel.
        taps: the position of each element of the kernel in the weight.
        row_from, row_to: the positions of the rows of a channel in the input and in the extended image.
        columns: the positions of the elements of a row in the extended image, relative to the row.
        columns_follow: whether these positions are consecutive.
        vector_from, vector_to: the positions of the vectors of results in the extended image and in the result.
        result_rows: positions of the rows of the result if vectors cross rows, so that they are written to a buffer.
        result_width: elements of such a row.
        buffer: elements of the buffer for a channel; 0 without one.
    """

    plane: int
    offsets: Tensor
    taps: Tensor
    row_from: Tensor
    row_to: Tensor
    columns: Tensor
    columns_follow: bool
    vector_from: Tensor
    vector_to: Tensor
    result_rows: Tensor
    result_width: int
    buffer: int


class _Extended:
    """The extended image of a channel: elements are ordered by their position modulo the stride, then by position."""

    def __init__(self, settings: Settings, result: Sizes) -> None:
        triples = zip(result, settings.stride, settings.kernel, settings.dilation, strict=True)
        self.size = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in triples]
        self.stride = settings.stride
        self.rows = [-(-n // s) for n, s in zip(self.size, settings.stride, strict=True)]
        self.plane = self.rows[0] * self.rows[1] * self.rows[2]
        _, high, wide = self.rows
        self._step = (high * wide, wide, 1)
        self._phase = (self.stride[1] * self.stride[2] * self.plane, self.stride[2] * self.plane, self.plane)

    @property
    def elements(self) -> int:
        """All elements of a channel."""
        return self.plane * self.stride[0] * self.stride[1] * self.stride[2]

    def at(self, dim: int, position: int) -> int:
        """The contribution of one dimension to the offset of an element."""
        place, phase = divmod(position, self.stride[dim])
        return place * self._step[dim] + phase * self._phase[dim]

    def at_result(self, d: int, h: int) -> int:
        """The place that the first result of a row reads for the first element of the kernel."""
        return d * self._step[0] + h * self._step[1]


@functools.lru_cache(maxsize=256)
def convolution_tables(
    settings: Settings, size: Sizes, steps: Sizes, result: Sizes, of_group: int, weight_steps: Sizes, lanes: int
) -> ConvolutionTables:
    """The positions for given shapes.

    Args:
        settings: the settings of the convolution.
        size: the spatial size of the input.
        steps: its spatial strides.
        result: the spatial size of the result.
        of_group: channels of the input in a group.
        weight_steps: the spatial strides of the weight.
        lanes: elements of a vector.
    """
    image = _Extended(settings, result)
    taps = list(itertools.product(*(range(k) for k in settings.kernel)))
    spread = [[image.at(dim, k * settings.dilation[dim]) for dim, k in enumerate(tap)] for tap in taps]
    offsets = [c * image.elements + sum(places) for c in range(of_group) for places in spread]
    kernel = settings.kernel
    of_weight = [[n - 1 - k for n, k in zip(kernel, tap, strict=True)] if settings.is_reversed else tap for tap in taps]
    inside = [
        [(i, e) for i in range(size[dim]) if 0 <= (e := settings.padding[dim] + settings.spacing[dim] * i) < last]
        for dim, last in enumerate(image.size)
    ]
    columns = inside[2]
    first = columns[0][0] * steps[2] if columns else 0
    rows = [
        (d * steps[0] + h * steps[1] + first, image.at(0, at_d) + image.at(1, at_h))
        for d, at_d in inside[0]
        for h, at_h in inside[1]
    ]
    columns_to = [image.at(2, e) for _, e in columns]
    start = columns_to[0] if columns_to else 0
    vector_from, vector_to, is_buffered = _vectors(image, result, lanes)
    result_rows = [image.at_result(d, h) for d in range(result[0]) for h in range(result[1])] if is_buffered else []
    return ConvolutionTables(
        plane=image.elements,
        offsets=_table(offsets),
        taps=_table([sum(k * s for k, s in zip(tap, weight_steps, strict=True)) for tap in of_weight]),
        row_from=_table([source for source, _ in rows]),
        row_to=_table([target + start for _, target in rows]),
        columns=_table([place - start for place in columns_to]),
        columns_follow=steps[2] == 1 and columns_to == list(range(start, start + len(columns_to))),
        vector_from=_table(vector_from),
        vector_to=_table(vector_to),
        result_rows=_table(result_rows),
        result_width=result[2],
        buffer=max(vector_to) + lanes if is_buffered else 0,
    )


def _vectors(image: _Extended, result: Sizes, lanes: int) -> tuple[list[int], list[int], bool]:
    """The places of vectors in the extended image and in the result, and whether the result is a buffer with gaps."""
    depth, high, wide = result
    runs = [(image.at_result(d, h), (d * high + h) * wide, wide) for d in range(depth) for h in range(high)]
    joined: list[tuple[int, int, int]] = []
    for source, target, length in runs:
        if joined and joined[-1][0] + joined[-1][2] == source:
            joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + length)
        else:
            joined.append((source, target, length))
    last = joined[-1][0] + joined[-1][2]
    across = range(0, last, lanes)
    along = sum(-(-length // lanes) for _, _, length in joined)
    if joined[0][2] < lanes or along > _MOST_WASTE * len(across):
        return list(across), list(across), True
    # The last vector of a row ends with the row: it computes some results of the vector before again.
    starts = [(s, t, min(k, n - lanes)) for s, t, n in joined for k in range(0, n, lanes)]
    return [s + k for s, _, k in starts], [t + k for _, t, k in starts], False


def _table(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
