"""Functions that capture inserts into a step graph: autograd functions, assignments to parts, size checks."""

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
    "copied",
    "expect_size",
    "read_parameter",
    "reduced_over_time",
    "set_part",
    "set_part_",
]


class FunctionHolder(nn.Module):
    """A module with an autograd.Function, so that a graph can refer to it: a class cannot be an FX argument."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function


def apply_autograd_function(holder: FunctionHolder, *args: Any) -> Any:
    """Call `holder.function.apply(*args)`: one node, which preserves the custom backward."""
    return holder.function.apply(*args)


def set_part(x: Tensor, index: Any, value: Any) -> Tensor:
    """The value of `x` after `x[index] = value`."""
    x = x.clone()
    x[index] = value
    return x


def set_part_(x: Tensor, index: Any, value: Any) -> Tensor:
    """`x[index] = value` in a captured graph: an in-place operation on `x`.

    `Normalize` replaces it by `set_part` before execution. Capture must not change the example value, so this function
    returns a copy.
    """
    return set_part(x, index, value)


def expect_size(size: int, expected: int, where: str) -> int:
    """Check a size that the Python code of the model used as a number during capture.

    Raises:
        InputError: SNNFX312, the size differs in this call.
    """
    if size != expected and isinstance(expected, bool):
        raise InputError(
            "SNNFX312",
            f"a condition on sizes or dtypes is {size}, but the step was captured with {expected}",
            where=where,
            why="the Python code of the model decided by it during capture.",
            hint="Convert again with example_inputs of the new sizes and dtypes.",
        )
    if size != expected:
        raise InputError(
            "SNNFX312",
            f"a size is {size}, but the step was captured with {expected}",
            where=where,
            why="the Python code of the model used it as a number during capture.",
            hint="Convert again with example_inputs of the new size.",
        )
    return size


def change_value(x: Any, value: Any) -> Any:
    """The result of an in-place change under `torch.no_grad()`: a new value with the autograd graph of `x`."""
    if not isinstance(x, Tensor) or not isinstance(value, Tensor):
        return value  # `+=` makes a new number
    return ValueAndGradients.apply(value.detach(), x)


def read_parameter(parameter: Tensor, value: Tensor) -> Tensor:
    """The value of a parameter that the steps change under `torch.no_grad()`, as one step reads it.

    Args:
        parameter: the parameter, which receives the gradients of all steps.
        value: its value in this step.
    """
    return ValueAndGradients.apply(value.detach(), parameter) if parameter.requires_grad else value


def copied(x: Tensor, value: Tensor) -> Tensor:
    """The value of `x` after `x.copy_(value)`."""
    return value.to(x).expand_as(x)


def reduced_over_time(x: Tensor) -> Tensor:
    """The operand, which the call reduces over time; it separates the nodes in front of the mean from those behind."""
    return x


class ValueAndGradients(torch.autograd.Function):
    """Return the first argument; gradients flow to both."""

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
