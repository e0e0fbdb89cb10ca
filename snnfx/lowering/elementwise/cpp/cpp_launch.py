"""The CPU back end: launch generated C++ on torch's threads, with a struct of arguments."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.back_end import BackEnd, WantedGradients
from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource, write_backward, write_forward
from snnfx.lowering.elementwise.expressions import StepExpressions
from snnfx.lowering.elementwise.operand_layout import MAX_DIMS, Layout
from snnfx.lowering.elementwise.saved_values import SavePlan
from snnfx.ops.buffer_pool import pool

__all__ = ["CppBackEnd", "address_words", "launch", "pack_arguments", "threads_for"]

MIN_PARALLEL_ELEMENTS = 1 << 14
"""Elements times steps from which on a kernel uses several threads."""


_SHORT_BLOCK = 1 << 11
"""Elements of a block that is never too long; longer blocks must leave `_MIN_LONG_BLOCKS` for each thread."""

_MIN_LONG_BLOCKS = 4
"""Blocks per thread, at least, if they are longer than `_SHORT_BLOCK`, so that the load is balanced."""


@functools.lru_cache(maxsize=4096)
def _as_integer(value: float) -> int:
    """The bits of a float64 number as an integer."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


_pools: dict[int, ThreadPoolExecutor] = {}


def launch(
    source: KernelSource, layout: Layout, T: int, operands: Sequence[tuple[int, float]], threads: int | None = None
) -> None:
    """Run a kernel.

    Args:
        source: the kernel, built at its first use.
        layout: the layout of its operands, in the order of `source.slots`.
        T: the number of time steps.
        operands: the address of each operand's first element, and its number if the address is 0.
        threads: number of threads; None: as many as torch uses.
    """
    if layout.elements == 0:
        return
    library = load(source)
    threads = threads_for(layout.elements, T, threads)
    words = pack_arguments(source, layout, T, operands, threads)
    arguments = (ctypes.c_int64 * len(words))(*words)
    if threads == 1 or openmp() is not None:
        library.run(arguments)
        return
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, "snnfx")
    for done in [_pools[threads].submit(library.run_part, arguments, k, threads) for k in range(threads)]:
        done.result()


def threads_for(elements: int, T: int, threads: int | None = None) -> int:
    """The number of threads that run a kernel: one for a small kernel, else `threads`, or as many as torch uses."""
    return 1 if elements * T < MIN_PARALLEL_ELEMENTS else threads or torch.get_num_threads()


def block_length(source: KernelSource, elements: int, threads: int) -> int:
    """Elements of a block; a kernel runs all steps of a block before the next block.

    Each step of a block starts at another address. Long blocks, whose states fit into the L2 cache, give the
    processor's prefetchers time to run ahead: a quarter faster than short blocks whose states fit into L1.
    """
    share = -(-elements // (64 * threads)) * 64  # whole words of bits
    length = min(source.block, _SHORT_BLOCK)
    while length < source.block and elements >= 2 * length * _MIN_LONG_BLOCKS * threads:
        length *= 2
    return max(64, min(length, share))


def pack_arguments(
    source: KernelSource, layout: Layout, T: int, operands: Sequence[tuple[int, float]], threads: int
) -> list[int]:
    """Pack the struct `Args` into 64-bit words."""
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


def address_words(source: KernelSource) -> list[int]:
    """The positions of the operands' addresses in the words of `pack_arguments`."""
    first = 8 + MAX_DIMS + max(1, len(source.literals))
    return [first + k * (4 + MAX_DIMS) for k in range(len(source.slots))]


def blocks_of(source: KernelSource, elements: int, T: int, threads: int | None = None) -> int:
    """The number of blocks that `launch` runs."""
    threads = threads_for(elements, T, threads)
    length = block_length(source, elements, threads)
    return -(-elements // length)


class CppBackEnd(BackEnd):
    """Generated C++ for CPU tensors."""

    def write_forward(self, step: StepExpressions, plan: SavePlan | None = None) -> KernelSource:
        return write_forward(step, plan)

    def write_forward_in_bits(self, step: StepExpressions) -> KernelSource:
        return write_forward(step, in_bits=True)

    def write_backward(self, step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> KernelSource:
        return write_backward(step, plan, wanted)

    def build(self, source: KernelSource, elements: int) -> None:
        load(source)

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return pool.empty(size, stride, dtype)

    def parts(self, source: KernelSource, elements: int, T: int) -> int:
        return blocks_of(source, elements, T)

    def run(self, source: KernelSource, layout: Layout, T: int, operands: Sequence[Tensor | float]) -> None:
        launch(source, layout, T, [(v.data_ptr(), 0.0) if isinstance(v, Tensor) else (0, v) for v in operands])
