"""Run a built kernel on tensors: where their elements are, which threads, and the struct that it is passed."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnfx.kernels.build import load, openmp
from snnfx.kernels.cpp import KernelSource
from snnfx.kernels.cpp_prelude import MAX_DIMS
from snnfx.kernels.record import NotLowered

__all__ = ["Layout", "Strides", "dense_strides", "launch", "memory_order", "plan_layout"]

_FEW = 1 << 14
"""Elements times steps up to which a second thread does not pay."""


@dataclass(frozen=True)
class Strides:
    """Where the elements of an operand are: from step to step, and along the dimensions of a `Layout`."""

    time: int
    dense: bool
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How the elements of a step are numbered, and where each operand has them.

    Args:
        elements: of a step.
        sizes: of the dimensions, slowest first, those taken together that are together in all operands.
        operands: in the order in which they were given.
    """

    elements: int
    sizes: tuple[int, ...]
    operands: tuple[Strides, ...]


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a step from the slowest to the fastest, as a tensor has them in memory."""
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
    """The strides of a tensor without gaps whose dimensions are in an order in memory."""
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
    """Number the elements of a step in memory order, with as few dimensions as the operands allow.

    Args:
        shape: of a step.
        order: its dimensions from the slowest to the fastest.
        operands: shape, strides and whether dimension 0 is time, of each; None for one that has no memory.
    """
    times: list[int] = []
    rows: list[list[int]] = []
    for given in operands:
        if given is None:
            times.append(0)
            rows.append([0] * len(shape))
            continue
        own, stride, has_time = given
        # One step more than there are is never read.
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
        raise NotLowered(f"its operands have {len(sizes)} dimensions that cannot be taken together")
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


@functools.lru_cache(maxsize=4096)
def _as_integer(value: float) -> int:
    """The bits of a double."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


_pools: dict[int, ThreadPoolExecutor] = {}


def launch(
    source: KernelSource, layout: Layout, T: int, operands: Sequence[tuple[int, float]], threads: int | None = None
) -> None:
    """Run a kernel.

    Args:
        source: the kernel, built at its first use.
        layout: of its operands, in the order of `source.slots`.
        T: the number of time steps.
        operands: address of each operand's first element and, where that is 0, the number that it is filled with.
        threads: None: as many as torch uses.
    """
    if layout.elements == 0:
        return
    library = load(source)
    threads = threads or torch.get_num_threads()
    if layout.elements * T < _FEW:
        threads = 1
    words = pack_arguments(source, layout, T, operands, threads)
    arguments = (ctypes.c_int64 * len(words))(*words)
    if threads == 1 or openmp() is not None:
        library.run(arguments)
        return
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "snnfx")
    for done in [_pools[threads].submit(library.run_part, arguments, k, threads) for k in range(threads)]:
        done.result()


def block_length(source: KernelSource, elements: int, threads: int) -> int:
    """Elements of a block: the most that there is room for, fewer where all threads would not get one."""
    share = -(-elements // (16 * threads)) * 16
    return max(16, min(source.block, share))


def pack_arguments(
    source: KernelSource, layout: Layout, T: int, operands: Sequence[tuple[int, float]], threads: int
) -> list[int]:
    """The struct `Args`, as 64-bit words."""
    runtime = openmp() if threads > 1 else None
    gap = [0] * (MAX_DIMS - len(layout.sizes))
    words: list[Any] = [T, layout.elements, block_length(source, layout.elements, threads), threads, len(layout.sizes)]
    words += runtime or (0, 0, 0)
    words += layout.sizes
    words += gap
    words += [_as_integer(value) for value in source.literals] or [0]
    for (address, fill), strides in zip(operands, layout.operands, strict=True):
        words += (address, strides.time, strides.dense, _as_integer(fill) if fill else 0)
        words += strides.stride
        words += gap
    return words


def blocks_of(source: KernelSource, elements: int, T: int, threads: int | None = None) -> int:
    """How many blocks `launch` makes."""
    threads = threads or torch.get_num_threads()
    if elements * T < _FEW:
        threads = 1
    length = block_length(source, elements, threads)
    return -(-elements // length)


def description(tensor: Tensor, has_time: bool) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """A tensor as `plan_layout` takes it; T does not count."""
    shape = tuple(tensor.shape)
    return ((min(shape[0], 2), *shape[1:]) if has_time else shape), tensor.stride(), has_time
