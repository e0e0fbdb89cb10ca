"""Memory layout of a kernel's operands: dimensions and strides."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import LoweringRefused

__all__ = [
    "MAX_DIMS",
    "Layout",
    "Strides",
    "broadcast",
    "dense_strides",
    "describe_operand",
    "memory_order",
    "plan_layout",
]

MAX_DIMS = 8
"""Dimensions of a step, at most, after collapsing those that can be collapsed."""


@dataclass(frozen=True)
class Strides:
    """Strides of an operand.

    Args:
        time: elements from one time step to the next.
        dense: whether the elements of a step are consecutive in memory.
        stride: elements along each dimension of the `Layout`.
    """

    time: int
    dense: bool
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The index space of a step and the strides of each operand in it.

    Args:
        elements: number of elements of a step.
        sizes: sizes of the dimensions, slowest first; dimensions that are contiguous in all operands are collapsed.
        operands: the strides of each operand.
    """

    elements: int
    sizes: tuple[int, ...]
    operands: tuple[Strides, ...]


@functools.lru_cache(maxsize=4096)
def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Cached `torch.broadcast_shapes`, which takes longer than a small kernel."""
    return tuple(torch.broadcast_shapes(*shapes))


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a tensor in memory order, slowest first."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            break
        expected *= size
    else:
        return tuple(range(len(shape)))
    if any(s == 0 for s, size in zip(stride, shape, strict=True) if size > 1):
        return tuple(range(len(shape)))
    return tuple(sorted(range(len(shape)), key=lambda d: -stride[d] if shape[d] != 1 else -(1 << 62)))


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor with a given memory order of its dimensions."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


@functools.lru_cache(maxsize=4096)
def plan_layout(
    shape: tuple[int, ...],
    order: tuple[int, ...],
    operands: tuple[tuple[tuple[int, ...], tuple[int, ...], bool] | None, ...],
) -> Layout:
    """Lay out the elements of a step in memory order, with as few dimensions as the operands allow.

    Args:
        shape: the shape of a step.
        order: its dimensions in memory order, slowest first.
        operands: shape, strides and whether dimension 0 is time, of each operand; None for a number.

    Raises:
        LoweringRefused: more than `MAX_DIMS` dimensions remain.
    """
    times: list[int] = []
    rows: list[list[int]] = []
    for given in operands:
        if given is None:
            times.append(0)
            rows.append([0] * len(shape))
            continue
        own, stride, has_time = given
        # The stride of a sequence of one step is never used; 0 makes layouts of the same form equal.
        times.append(stride[0] if has_time and own[0] != 1 else 0)
        own, stride = (own[1:], stride[1:]) if has_time else (own, stride)
        missing = len(shape) - len(own)
        rows.append([0] * missing + [0 if n == 1 else s for n, s in zip(own, stride, strict=True)])
    dims = [d for d in order if shape[d] != 1]
    sizes: list[int] = []
    columns: list[list[int]] = []
    for d in dims:
        column = [row[d] for row in rows]
        if sizes and all(c == s * shape[d] for c, s in zip(columns[-1], column, strict=True)):
            sizes[-1] *= shape[d]
            columns[-1] = column
        else:
            sizes.append(shape[d])
            columns.append(column)
    if not sizes:
        sizes, columns = [1], [[0] * len(rows)]
    if len(sizes) > MAX_DIMS:
        raise LoweringRefused(f"its operands have {len(sizes)} dimensions that cannot be collapsed")
    elements = 1
    for size in shape:
        elements *= size
    canonical = [1] * len(sizes)
    for d in range(len(sizes) - 2, -1, -1):
        canonical[d] = canonical[d + 1] * sizes[d + 1]
    found = []
    for number, time in enumerate(times):
        stride = tuple(column[number] for column in columns)
        dense = all(s == c or n == 1 for s, c, n in zip(stride, canonical, sizes, strict=True))
        found.append(Strides(time, dense, stride))
    return Layout(elements, tuple(sizes), tuple(found))


def describe_operand(tensor: Tensor, has_time: bool) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """The description of a tensor for `plan_layout`, independent of T."""
    shape = tuple(tensor.shape)
    return ((min(shape[0], 2), *shape[1:]) if has_time else shape), tensor.stride(), has_time
