"""Recorded calls that are linear in the gradients among their operands, so that they commute with a sum over time.

The derivative of an operator is linear in its incoming gradient, so every call that autograd itself makes in a backward
pass is. The backward of an `autograd.Function` need not be: it may clip or normalise its gradient, or add a constant.
"""

from __future__ import annotations

from collections.abc import Sequence

from snnfx.lowering.aten_recording import AtenCall, RecordedValue

__all__ = ["LINEAR", "VIEWS", "is_linear", "is_linear_by_table"]

VIEWS = frozenset(
    "t transpose permute view _unsafe_view reshape _reshape_alias unsqueeze squeeze expand slice select unbind split "
    "split_with_sizes unsafe_split unsafe_chunk chunk narrow detach alias".split()
)
"""Operators whose results may be views of their operand."""

LINEAR = VIEWS | frozenset(
    "mm bmm sum mean neg mul div add sub clone contiguous _to_copy cat stack select_backward slice_backward "
    "unsqueeze_copy squeeze_copy expand_copy view_copy _weight_norm_interface_backward".split()
)
"""Operators that are linear in one operand, or in all of them."""

_LINEAR_IN_ALL = ("add", "sub", "cat", "stack")


def is_linear_by_table(call: AtenCall, values: Sequence[RecordedValue]) -> bool:
    """Whether a call is linear in its varying operands, which all depend on a gradient, by the table of operators."""
    references = call.references()
    varying = [r for r in references if values[r].varying]
    if any(not values[r].depends_on_grad for r in varying):
        return False
    if call.name in _LINEAR_IN_ALL:
        return len(varying) == len(references) and _has_no_number_as_operand(call)
    if call.name == "div" and getattr(call.args[0], "number", None) not in varying:
        return False
    return call.name in LINEAR and len(varying) == 1


def is_linear(call: AtenCall, values: Sequence[RecordedValue]) -> bool:
    """Whether a call is linear in its varying operands, by the table or because autograd makes it."""
    if is_linear_by_table(call, values):
        return True
    varying = [r for r in call.references() if values[r].varying]
    is_known = len(varying) == 1 and values[varying[0]].depends_on_grad
    return is_known and not call.in_custom_backward and call.name not in _LINEAR_IN_ALL


def _has_no_number_as_operand(call: AtenCall) -> bool:
    """Whether the operands of a sum are tensors: `x + 1` is affine."""
    return call.name in ("cat", "stack") or len(call.references()) == 2
