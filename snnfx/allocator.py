"""Tune the C library's allocator to reuse the memory of large tensors, which avoids page faults."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

__all__ = ["expect_large_blocks", "is_tuned", "tune_allocator"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_LEARNT = 32 * 2**20 - 64 * 2**10
"""Size in bytes of the largest block that adjusts glibc's threshold, minus room for its bookkeeping."""

_tuned = False


def is_tuned() -> bool:
    """Whether `tune_allocator` has been called."""
    return _tuned


@functools.cache
def expect_large_blocks() -> None:
    """Raise glibc's dynamic mmap threshold by freeing one large block, once per process.

    glibc raises its mmap threshold to the size of the largest freed block (up to 32 MB): smaller blocks then come from
    the heap, and twice that size stays in the process when it is freed. Without this, the speed of the first calls of a
    net depends on the order in which its tensors are freed, with a page fault for every page of each new tensor. The
    block is never written, so it takes no physical memory.

    Source: mallopt(3), dynamic mmap threshold.
    """
    if sys.platform.startswith("linux"):
        torch.empty(_LARGEST_LEARNT, dtype=torch.uint8, device="cpu")


def tune_allocator(largest: int = 1 << 30) -> bool:
    """Keep freed CPU memory in the process for reuse (glibc only).

    By default, glibc requests every block of 32 MB or more from the system and returns it when it is freed. The first
    write to such a tensor costs a page fault for every 4 kB, often more time than computing it. After this call, blocks
    of up to `largest` bytes come from the heap, and the heap is never trimmed: the memory of the process stays at its
    peak. Convolutions, linear layers and other operations of PyTorch become faster; generated kernels reuse their
    buffers anyway. The setting affects the whole process and cannot be undone.

    Args:
        largest: size in bytes of the largest block to keep, from 1 to 2**31 - 1. Default: 1 GiB.

    Returns:
        True if the setting was changed; False if the C library does not support it (macOS, Windows, musl).

    Raises:
        ValueError: `largest` is out of range.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    if not 0 < largest < 1 << 31:
        raise ValueError(f"largest={largest} must be above 0 and below 2**31")
    if not sys.platform.startswith("linux"):
        return False
    global _tuned
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    threshold_set = library.mallopt(_M_MMAP_THRESHOLD, ctypes.c_int(largest))
    trim_set = library.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int((1 << 31) - 1))
    _tuned = bool(threshold_set and trim_set)
    return _tuned
