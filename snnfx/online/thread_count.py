"""One thread for steps that are so small that a second one is waited for longer than it helps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["is_small", "one_thread"]

_FEW = 1 << 20
"""Multiplications of a layer up to which it takes one thread about as long as starting and awaiting others."""


def is_small(parameters: Iterable[nn.Parameter], elements: int) -> bool:
    """Whether every layer of a step is small.

    Args:
        parameters: of the model; each element of what a weight `[out, in, *]` computes is a sum over `in` and the rest.
        elements: of the largest state of a step; 0: not known, so it may be large.
    """
    terms = max((p.numel() // p.shape[0] for p in parameters if p.dim() > 1 and p.shape[0]), default=1)
    return 0 < elements * terms <= _FEW


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's CPU operators run on the calling thread alone; for the whole process, until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
