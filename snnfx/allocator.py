"""Tell the C library to keep the memory of large tensors, so that the next one does not fault every page in anew."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

__all__ = ["expect_large_blocks", "is_tuned", "tune_allocator"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_LEARNT = 32 * 2**20 - 64 * 2**10
"""Bytes of the largest block that glibc learns from, with some left for its own records."""

_tuned = False


def is_tuned() -> bool:
    """Whether `tune_allocator` has been called."""
    return _tuned


@functools.cache
def expect_large_blocks() -> None:
    """Free one large block, once in a process, as any program does sooner or later.

    glibc learns from the largest block of up to 32 MB that was freed: smaller ones then come from the heap, of which
    it keeps twice as much when it is freed. Otherwise the first calls of a net depend on the order in which its
    tensors happened to be freed, and may fault every page in anew. The block is never written: it takes no memory.

    Source: mallopt(3), on the dynamic mmap threshold.
    """
    if sys.platform.startswith("linux"):
        torch.empty(_LARGEST_LEARNT, dtype=torch.uint8, device="cpu")


def tune_allocator(largest: int = 1 << 30) -> bool:
    """Keep freed memory in the process, for all tensors on the CPU (glibc only).

    glibc takes every block of 32 MB and more fresh from the system and gives it back when it is freed; writing such a
    tensor for the first time costs a page fault for every 4 kB, often more than computing it. After this call blocks up
    to `largest` bytes come from the heap, and the heap is not trimmed: the memory of the process stays at its peak.
    Generated kernels do not need it, since they reuse their buffers; convolutions, linear layers and the rest of
    PyTorch do. It acts on the whole process and cannot be undone.

    Args:
        largest: bytes of the largest block to keep, at least 1.

    Returns:
        True; False where the C library has no such setting (macOS, Windows, musl), and nothing was changed.

    Raises:
        ValueError: `largest` is not positive or does not fit into 31 bits.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    if not 0 < largest < 1 << 31:
        raise ValueError(f"largest={largest} has to be above 0 and below 2**31")
    if not sys.platform.startswith("linux"):
        return False
    global _tuned
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    kept = library.mallopt(_M_MMAP_THRESHOLD, ctypes.c_int(largest))
    trimmed = library.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int((1 << 31) - 1))
    _tuned = bool(kept and trimmed)
    return _tuned
