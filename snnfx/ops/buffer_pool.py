"""A pool of CPU memory for the sequences that kernels write.

Writing a new large tensor is dominated by page faults: the C library returns blocks of 32 MB and more to the system
when they are freed, and every page of the next block must be mapped again. The pool reuses the memory of a freed tensor
for the next tensor of about its size.

A block is allocated as a ctypes array, wrapped by `torch.frombuffer`. The storage of the tensor references the array;
views and autograd reference the storage. When the last reference is dropped, a weak reference to the array returns its
block to the pool.
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

__all__ = ["MIN_POOLED_BYTES", "BufferPool", "empty_like", "pool", "release_buffers"]

MIN_POOLED_BYTES = 1 << 20
"""The smallest tensor allocated from the pool, in bytes; malloc is fast for smaller ones."""


def _default_limit() -> int:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 8 << 30
    return min(memory // 8, 2 << 30)


class BufferPool:
    """Blocks of memory allocated as tensors and returned automatically when the tensor is freed.

    Args:
        limit: the most unused bytes to keep (default: an eighth of the memory, at most 2 GiB).
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = _default_limit() if limit is None else limit
        self.free_bytes = 0
        self._free: list[Tensor] = []
        self._in_use: dict[int, tuple[weakref.ref[object], Tensor]] = {}
        # Filled by weak references, which may fire in any thread and in the middle of any line: append is atomic.
        self._returned: deque[int] = deque()
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Like `torch.empty_strided`, for a tensor whose elements fill its storage."""
        count = 1
        for extent in size:
            count *= extent
        needed = count * dtype.itemsize
        if needed < MIN_POOLED_BYTES or self.limit <= 0:
            # With a device, because `torch.set_default_device` may name another one.
            return torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        array = self._allocate(needed)
        storage = torch.frombuffer(array, dtype=torch.uint8).untyped_storage()
        # Not a view, which autograd would not let its owner change in place.
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, size, stride)

    def _allocate(self, needed: int) -> ctypes.Array[ctypes.c_char]:
        with self._lock:
            self._collect_returned()
            fitting = [b for b in self._free if needed <= b.numel() <= needed + needed // 4]
            if fitting:
                block = min(fitting, key=lambda b: b.numel())
                self._free = [b for b in self._free if b is not block]
                self.free_bytes -= block.numel()
            else:
                block = torch.empty(needed, dtype=torch.uint8, device="cpu")
            array = (ctypes.c_char * needed).from_address(block.data_ptr())
            key = next(self._numbers)
            self._in_use[key] = (weakref.ref(array, lambda _, key=key: self._returned.append(key)), block)  # type: ignore[misc]
            return array

    def _collect_returned(self) -> None:
        while self._returned:
            _, block = self._in_use.pop(self._returned.popleft())
            self._free.append(block)
            self.free_bytes += block.numel()
        while self.free_bytes > self.limit:
            self.free_bytes -= self._free.pop(0).numel()

    def release(self) -> int:
        """Return unused blocks to the system; returns the number of bytes."""
        with self._lock:
            self._collect_returned()
            released, self.free_bytes = self.free_bytes, 0
            self._free.clear()
            return released


pool = BufferPool()


def empty_like(tensor: Tensor) -> Tensor:
    """`torch.empty_like` of a dense tensor, allocated from the pool for plain CPU tensors."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    if torch.compiler.is_compiling() or not is_plain or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return torch.empty_like(tensor)
    return pool.empty(tensor.shape, tensor.stride(), tensor.dtype)


def release_buffers() -> int:
    """Return the unused memory of the kernels' buffer pool to the system.

    Returns:
        The number of bytes returned. Memory of live tensors is not affected.
    """
    return pool.release()
