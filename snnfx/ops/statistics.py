"""Reads of statistics that a layer updates in place, such as the running mean of a BatchNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["read_statistic"]


def read_statistic(module: nn.Module, name: str, after: Any = None) -> Tensor:
    """Copy a buffer that calls of a step update in place.

    Args:
        module: the module that has the buffer.
        name: name of the buffer.
        after: the result of the last call that updates the buffer before this read; None: no call does. It only orders
            the two: a graph has no other edge between them.
    """
    value: Tensor = getattr(module, name)
    return value.clone()
