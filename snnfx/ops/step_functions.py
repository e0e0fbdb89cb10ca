"""The functions of its own that a captured step calls: autograd functions kept whole, and sizes that are pinned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError

__all__ = [
    "FunctionHolder",
    "ValueAndGradients",
    "apply_autograd_function",
    "change_value",
    "expect_size",
    "set_part",
    "set_part_",
]


class FunctionHolder(nn.Module):
    """Holds an autograd.Function so that a graph can refer to it: a class cannot be printed as an argument."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function


def apply_autograd_function(holder: FunctionHolder, *args: Any) -> Any:
    """Call `holder.function.apply(*args)`: the node that keeps a custom backward."""
    return holder.function.apply(*args)


def set_part(x: Tensor, index: Any, value: Any) -> Tensor:
    """What `x` is after `x[index] = value`."""
    x = x.clone()
    x[index] = value
    return x


def set_part_(x: Tensor, index: Any, value: Any) -> Tensor:
    """`x[index] = value` as the model writes it: to the graph, an operation in place on `x`.

    Passes replace it by `set_part` before anything runs; the example value must not be changed while capturing.
    """
    return set_part(x, index, value)


def expect_size(size: int, expected: int, where: str) -> int:
    """Fail when a size that the model's Python code used as a number is another one in this call."""
    if size != expected:
        raise InputError(
            "SNNFX312",
            f"a size is {size}, but the step was captured with {expected}",
            where=where,
            why="the model's Python code used it as a number while it was captured.",
            hint="Convert again with example_inputs of the new size.",
        )
    return size


def change_value(x: Any, value: Any) -> Any:
    """What `x` is after a change in place under `torch.no_grad()`: another value with the history of `x`."""
    if not isinstance(x, Tensor) or not isinstance(value, Tensor):
        return value  # `+=` makes a new number
    return ValueAndGradients.apply(value.detach(), x)


class ValueAndGradients(torch.autograd.Function):
    """The value of the first; gradients go to both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad
