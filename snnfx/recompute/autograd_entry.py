"""How a value enters a history that does not hold it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_to_graph"]


def attach_to_graph(value: Tensor) -> tuple[Tensor, Tensor]:
    """`(token, the value with a history)`: the gradient of the value is that of the token, which takes no memory.

    As a leaf, the value would live as long as its history; this way nobody holds it once it has been used.
    """
    token = value.new_empty(()).expand(value.shape).requires_grad_()
    entered: Tensor = _AttachToGraph.apply(token, [value])
    return token, entered


class _AttachToGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, value: list[Tensor]) -> Tensor:
        return value.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
