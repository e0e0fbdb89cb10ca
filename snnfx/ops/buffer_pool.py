"""Memory for the sequences that kernels write, used again when a tensor is gone.

Most of the time of writing a fresh large tensor goes into page faults: the C library gives blocks of 32 MB and more
back to the system at once, and the next one comes with every page to be mapped anew. Here the memory of a tensor that
has died goes to the next one of about its size.

A block is given out as a ctypes array, of which `torch.frombuffer` makes a tensor. The tensor's storage holds the
array, views and autograd hold the storage. When nobody does any more, the array dies, and a weak reference hands its
block back.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BufferPool", "empty_like", "pool", "release_buffers"]

_LEAST = 1 << 20
"""Bytes from which on a tensor comes from the pool; malloc is good at smaller ones."""


def _default_limit() -> int:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 8 << 30
    return min(memory // 8, 2 << 30)


class BufferPool:
    """Blocks of memory that are given out as tensors and come back by themselves.

    Args:
        limit: most bytes kept that nobody uses.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = _default_limit() if limit is None else limit
        self.free_bytes = 0
        self._free: list[Tensor] = []
        self._given: dict[int, tuple[weakref.ref[object], Tensor]] = {}
        # Filled by weak references, which may fire in any thread and in the middle of any line: append is atomic.
        self._returned: deque[int] = deque()
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor like `torch.empty_strided`, whose elements fill its storage."""
        count = 1
        for extent in size:
            count *= extent
        needed = count * dtype.itemsize
        if needed < _LEAST or self.limit <= 0:
            return torch.empty_strided(size, stride, dtype=dtype)
        array = self._give(needed)
        return torch.frombuffer(array, dtype=dtype, count=count).as_strided(size, stride)

    def _give(self, needed: int) -> ctypes.Array[ctypes.c_char]:
        with self._lock:
            self._take_back()
            fitting = [b for b in self._free if needed <= b.numel() <= needed + needed // 4]
            if fitting:
                block = min(fitting, key=lambda b: b.numel())
                self._free = [b for b in self._free if b is not block]
                self.free_bytes -= block.numel()
            else:
                block = torch.empty(needed, dtype=torch.uint8)
            array = (ctypes.c_char * needed).from_address(block.data_ptr())
            key = next(self._numbers)
            self._given[key] = (weakref.ref(array, lambda _, key=key: self._returned.append(key)), block)  # type: ignore[misc]
            return array

    def _take_back(self) -> None:
        while self._returned:
            _, block = self._given.pop(self._returned.popleft())
            self._free.append(block)
            self.free_bytes += block.numel()
        while self.free_bytes > self.limit:
            self.free_bytes -= self._free.pop(0).numel()

    def release(self) -> int:
        """Give unused blocks back to the system; the number of bytes."""
        with self._lock:
            self._take_back()
            released, self.free_bytes = self.free_bytes, 0
            self._free.clear()
            return released


pool = BufferPool()


def empty_like(tensor: Tensor) -> Tensor:
    """`torch.empty_like` of a dense tensor, with memory of the pool where it is a tensor in the memory of the CPU."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if torch.compiler.is_compiling() or not is_plain or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return torch.empty_like(tensor)
    return pool.empty(tensor.shape, tensor.stride(), tensor.dtype)


def release_buffers() -> int:
    """Give the memory that kernels keep for their next outputs back to the system.

    Returns:
        The number of bytes given back. What tensors still use is not touched.
    """
    return pool.release()
