"""Elements of sequences: what the graphs of models that run over time themselves call around their loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snnfx.errors import InputError

__all__ = ["at_least", "concatenate_elements", "hold", "read_elements", "stack_elements", "write_elements"]


def at_least(steps: int, least: int) -> int:
    """The number of time steps of a call, if all iterations that run apart from a loop have one.

    Raises:
        InputError: SNNFX231, there are fewer steps.
    """
    if steps < least:
        raise InputError(
            "SNNFX231",
            f"a call of {steps} time step{'' if steps == 1 else 's'} is too short for its loop over time",
            why="the first and the last iteration run apart from all others.",
            hint=f"Pass an input with at least {least} time steps.",
        )
    return steps


def read_elements(x: Tensor, dim: int, start: int, step: int, count: int) -> Tensor:
    """The elements `start`, `start + step`, ... of one dimension, which becomes the first.

    Indices below 0 count from the end, as in `x[t - 1]` for t = 0.

    Raises:
        InputError: SNNFX231, an index is out of range.
    """
    size, last = x.shape[dim], start + (count - 1) * step
    if count > 0 and not (-size <= min(start, last) and max(start, last) < size):
        raise InputError(
            "SNNFX231",
            f"a loop over time reads the elements {start} to {last} of a dimension of size {size}",
            why="the number of iterations of this loop does not depend on the size of that input.",
            hint=f"Pass an input with at least {max(start, last) + 1} time steps.",
        )
    x = x.movedim(dim, 0)
    if count < 1:
        return x[:0]
    low, high = min(start, last), max(start, last)
    if low < 0 <= high:
        index = torch.arange(start, last + (1 if step > 0 else -1), step, device=x.device)
        return x[index % size]
    if low < 0:
        low, high = low + size, high + size
    if (low, high) != (0, size - 1) or abs(step) != 1:
        x = x[low : high + 1 : abs(step)]
    return x.flip(0) if step < 0 else x


def stack_elements(parts: Sequence[Tensor], is_sequence: Sequence[bool], dim: int = 0) -> Tensor:
    """`torch.stack` of a list whose parts are single elements, or sequences of elements with time first."""
    rank = next(p.dim() - s for p, s in zip(parts, is_sequence, strict=True))
    dim %= rank + 1
    moved = [p.movedim(0, dim) if s else p.unsqueeze(dim) for p, s in zip(parts, is_sequence, strict=True)]
    return moved[0] if len(moved) == 1 else torch.cat(moved, dim)


def concatenate_elements(parts: Sequence[Tensor], is_sequence: Sequence[bool], dim: int = 0) -> Tensor:
    """`torch.cat` of a list whose parts are single elements, or sequences of elements with time first."""
    rank = next(p.dim() - s for p, s in zip(parts, is_sequence, strict=True))
    dim %= rank
    moved = [p.movedim(0, dim).flatten(dim, dim + 1) if s else p for p, s in zip(parts, is_sequence, strict=True)]
    return moved[0] if len(moved) == 1 else torch.cat(moved, dim)


def write_elements(x: Tensor, dim: int, start: int, step: int, values: Tensor) -> Tensor:
    """The value of `x` after `x[start] = values[0]`, `x[start + step] = values[1]`, ... along one dimension."""
    last = start + (values.shape[0] - 1) * step
    low, high = min(start, last), max(start, last)
    if (low, high, abs(step)) == (0, x.shape[dim] - 1, 1):
        values = values.flip(0) if step < 0 else values
        return values.to(x.dtype).movedim(0, dim).expand_as(x)
    index = torch.arange(start, last + (1 if step > 0 else -1), step, device=x.device) % x.shape[dim]
    return x.index_copy(dim, index, values.to(x.dtype).movedim(0, dim))


def hold(x: Tensor) -> Tensor:
    """The value itself, which an iteration of a loop holds for the next one."""
    return x
