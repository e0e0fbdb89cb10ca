"""Test whether the backward of an autograd.Function is linear in the incoming gradient.

An invariant node runs once for all time steps, and its backward receives the sum of the gradients of all steps. That is
legal if the backward is linear. A custom backward need not be: it may clip or normalise the gradient, or add a penalty.
The test may only veto: it runs the backward for random gradients of several sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.ir.facts import VALUE
from snnfx.ir.program import StepProgram
from snnfx.ops.step_functions import apply_autograd_function
from snnfx.sandbox.internal_faults import is_internal_fault, surface
from snnfx.sandbox.torch_internals import pytree

__all__ = ["has_nonlinear_backward"]

_SIZES = (1e-4, 1.0, 1e4)
"""Sizes of the gradients: a bound shows at large ones, a penalty at small ones."""
_TOLERANCE = 1e-3


def has_nonlinear_backward(program: StepProgram, node: Node) -> bool:
    """Whether a node calls an autograd.Function on invariant operands and its backward is not linear.

    Operands that depend on an input or on a module are random numbers of their shape. False if the shape is unknown.
    """
    if node.target is not apply_autograd_function:
        return False
    try:
        values = _operand_values(program, node)
        return values is not None and _is_nonlinear(*values)
    except Exception as error:
        if is_internal_fault(error):
            surface(error, "an autograd.Function runs once for all time steps")
        return False  # the function raises an error, as it will in a call of the net


def _operand_values(program: StepProgram, node: Node) -> tuple[Any, Sequence[Any]] | None:
    """The holder of the function and its operands; None if an operand is unknown."""
    values: dict[Node, Any] = {}

    def value_of(operand: Node) -> Any:
        if operand not in values:
            if operand.op == "get_attr":
                values[operand] = program.resolve(str(operand.target))
            elif operand.op in ("call_function", "call_method"):
                args, kwargs = fx.map_arg((operand.args, operand.kwargs), value_of)
                if operand.op == "call_function":
                    values[operand] = operand.target(*args, **kwargs)  # type: ignore[operator]
                else:
                    values[operand] = getattr(args[0], str(operand.target))(*args[1:], **kwargs)
            else:
                raise _UnknownOperand
        return values[operand]

    def value_or_example(operand: Node) -> Any:
        try:
            return value_of(operand)
        except _UnknownOperand:
            example = VALUE.of(operand)
            if not isinstance(example, Tensor) or not example.is_floating_point():
                raise
            device = next((p.device for p in program.source.parameters()), torch.device("cpu"))
            return torch.randn(tuple(example.shape), generator=torch.Generator().manual_seed(1)).to(
                device, example.dtype
            )

    try:
        with torch.no_grad():
            holder, *operands = fx.map_arg(node.args, value_or_example)
    except _UnknownOperand:
        return None
    return holder, operands


class _UnknownOperand(Exception):
    """An operand depends on an input or is computed by a module."""


def _is_nonlinear(holder: Any, operands: Sequence[Any]) -> bool:
    leaves, spec = pytree.tree_flatten(list(operands))
    leaves = [_leaf(x) for x in leaves]
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    with torch.enable_grad():
        results = pytree.tree_leaves(apply_autograd_function(holder, *pytree.tree_unflatten(leaves, spec)))
    outputs = [y for y in results if isinstance(y, Tensor) and y.requires_grad]
    if not inputs or not outputs:
        return False

    def gradients(grads: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g.clone() for x, g in zip(inputs, found, strict=True)]

    generator = torch.Generator().manual_seed(0)
    for size in _SIZES:
        a, b = ([_random_like(y, size, generator) for y in outputs] for _ in range(2))
        of_sum = gradients([x + y for x, y in zip(a, b, strict=True)])
        for first, second, both in zip(gradients(a), gradients(b), of_sum, strict=True):
            scale = max(float(g.abs().max()) if g.numel() else 0.0 for g in (first, second, both))
            if not bool(((first + second - both).abs() <= _TOLERANCE * scale).all()):
                return True
    return False


def _random_like(example: Tensor, size: float, generator: torch.Generator) -> Tensor:
    return (size * torch.randn(tuple(example.shape), generator=generator)).to(example.device, example.dtype)


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())
