"""Attach a tensor to an autograd graph that does not keep the tensor alive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_to_graph"]


def attach_to_graph(value: Tensor) -> tuple[Tensor, Tensor]:
    """Give a tensor an autograd graph whose leaf takes no memory.

    As a leaf, the tensor itself would live as long as the graph. Here the leaf is a token with the same shape, and the
    tensor is freed after its last use.

    Returns:
        `(token, value)`: the gradient of `value` is the gradient of `token`.
    """
    token = value.new_empty(()).expand(value.shape).requires_grad_()
    attached: Tensor = _AttachToGraph.apply(token, [value])
    return token, attached


class _AttachToGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, value: list[Tensor]) -> Tensor:
        return value.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
