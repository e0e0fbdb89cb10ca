"""Divide a copy of a value into rows of consecutive bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snnfx.lowering.mixed.operations import Copy

__all__ = ["CopiedRows", "plan_copy"]

_MOST_ROWS = 1 << 12
"""Rows of a sample up to which the compiled loop copies them; PyTorch needs no list of their positions."""


@dataclass(frozen=True)
class CopiedRows:
    """The rows of each sample.

    Args:
        samples: the number of samples.
        width: bytes of a row.
        source_step, target_step: bytes from one sample to the next.
        source, target: bytes from the first row of a sample to each row, int64.
    """

    samples: int
    width: int
    source_step: int
    target_step: int
    source: Tensor
    target: Tensor


def plan_copy(copy: Copy) -> CopiedRows | None:
    """The rows of a copy; None if the dtype changes or a sample has too many rows."""
    source, target = copy.source.tensor, copy.target.tensor
    missing = target.dim() - source.dim()
    if source.dtype != target.dtype or missing < 0:
        return None
    shape = tuple(target.shape[1:])
    read = source[(slice(None), *(None,) * missing)].expand(source.shape[0], *shape)
    size = target.element_size()
    if not shape:
        return CopiedRows(1, size, size, size, _table((0,)), _table((0,)))
    rows = _rows(shape[1:], tuple(read.stride()[2:]), tuple(target.stride()[2:]), size)
    if rows is None:
        return None
    width, of_source, of_target = rows
    return CopiedRows(shape[0], width, read.stride(1) * size, target.stride(1) * size, of_source, of_target)


@functools.lru_cache(maxsize=256)
def _rows(
    shape: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...], size: int
) -> tuple[int, Tensor, Tensor] | None:
    """Bytes of a row, and the positions of the rows in the source and in the target."""
    length, dims = 1, len(shape)
    while dims and (shape[dims - 1] == 1 or source[dims - 1] == target[dims - 1] == length):
        dims -= 1
        length *= shape[dims]
    places = [(0, 0)]
    for count, of_source, of_target in zip(shape[:dims], source, target, strict=False):
        if len(places) * count > _MOST_ROWS:
            return None
        places = [(a + k * of_source * size, b + k * of_target * size) for a, b in places for k in range(count)]
    return length * size, _table([a for a, _ in places]), _table([b for _, b in places])


def _table(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
