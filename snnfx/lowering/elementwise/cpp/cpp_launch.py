"""The back end of the CPU: generated C++, launched on torch's threads with a struct of arguments."""

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

__all__ = ["CppBackEnd", "launch"]

_FEW = 1 << 14
"""Elements times steps up to which a second thread does not pay."""


_SHORT = 1 << 11
"""Elements from which on longer blocks have to leave enough for all threads."""

_EACH = 4
"""Longer blocks that each thread gets at least, lest some threads wait for others."""


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
    """Elements of a block, all of whose steps are done before the next block.

    Each step of a block begins at another place in memory. Long blocks, with their states in the L2 cache, give the
    prefetchers of the processor time to run ahead: a quarter faster than short ones whose states fit into L1.
    """
    share = -(-elements // (16 * threads)) * 16
    length = min(source.block, _SHORT)
    while length < source.block and elements >= 2 * length * _EACH * threads:
        length *= 2
    return max(16, min(length, share))


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


def address_words(source: KernelSource) -> list[int]:
    """Where `pack_arguments` has the address of each operand."""
    first = 8 + MAX_DIMS + max(1, len(source.literals))
    return [first + k * (4 + MAX_DIMS) for k in range(len(source.slots))]


def blocks_of(source: KernelSource, elements: int, T: int, threads: int | None = None) -> int:
    """How many blocks `launch` makes."""
    threads = threads or torch.get_num_threads()
    if elements * T < _FEW:
        threads = 1
    length = block_length(source, elements, threads)
    return -(-elements // length)


class CppBackEnd(BackEnd):
    """Generated C++ for tensors on the CPU."""

    def write_forward(self, step: StepExpressions, plan: SavePlan | None = None) -> KernelSource:
        return write_forward(step, plan)

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
