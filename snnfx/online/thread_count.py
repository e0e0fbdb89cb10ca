"""Run very small time steps on one thread: starting a second thread costs more than it saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["is_small_step", "one_thread"]

_MOST_MULTIPLICATIONS = 1 << 20
"""Largest layer, in multiplications, for which one thread is about as fast as several."""


def is_small_step(parameters: Iterable[nn.Parameter], elements: int) -> bool:
    """Whether every layer of a time step is small enough for one thread.

    Args:
        parameters: of the model. An output element of a weight `[out, in, *]` is a sum of `in * ...` products.
        elements: elements of the largest state of one step; 0 if unknown, which counts as large.
    """
    terms = max((p.numel() // p.shape[0] for p in parameters if p.dim() > 1 and p.shape[0]), default=1)
    return 0 < elements * terms <= _MOST_MULTIPLICATIONS


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch's CPU operators to one thread, for the whole process, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
