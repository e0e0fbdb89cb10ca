"""Recorded calls that are linear in the gradients among their operands, so that they commute with a sum over time.

The derivative of an operator is linear in its incoming gradient, so every call that autograd itself makes in a backward
pass is. The backward of an `autograd.Function` need not be: it may clip or normalise its gradient, or add a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from snnfx.lowering.aten_recording import AtenCall, RecordedValue

__all__ = ["is_linear", "is_linear_by_table"]


def is_linear_by_table(call: AtenCall, values: Sequence[RecordedValue]) -> bool:
    """Whether a call is linear in its varying operands, which all depend on a gradient, by the table of operators."""
    references, traits = call.references(), call.traits
    varying = [r for r in references if values[r].varying]
    if any(not values[r].depends_on_grad for r in varying):
        return False
    if traits.linear == "all":
        return len(varying) == len(references) and _has_no_number_as_operand(call)
    if len(varying) != 1 or _argument(call, traits.offset) is not None:
        return False
    if _argument(call, traits.linear_without) is not None:
        return False
    if traits.linear == "first":
        return bool(call.args) and getattr(call.args[0], "number", None) in varying
    return traits.linear == "each" or traits.view == "view"


def _argument(call: AtenCall, name: str) -> Any:
    """An argument of a call by its name in the schema; None if it is not passed."""
    names = [a.name for a in call.target._schema.arguments]
    position = names.index(name) if name in names else len(call.args)
    return call.args[position] if position < len(call.args) else call.kwargs.get(name)


def is_linear(call: AtenCall, values: Sequence[RecordedValue]) -> bool:
    """Whether a call is linear in its varying operands, by the table or because autograd makes it."""
    if is_linear_by_table(call, values):
        return True
    varying = [r for r in call.references() if values[r].varying]
    is_known = len(varying) == 1 and values[varying[0]].depends_on_grad
    return is_known and not call.in_custom_backward and call.traits.linear != "all"


def _has_no_number_as_operand(call: AtenCall) -> bool:
    """Whether the operands of a sum are tensors: `x + 1` is affine."""
    return call.traits.joins or len(call.references()) == 2
