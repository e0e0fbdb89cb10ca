"""Translate selections by a mask, `x[mask]` and `x[mask] = y`, to expressions of one element.

The size of `x[mask]` depends on the data, but an element-wise function of it, written back by the same mask, is a
choice for each element: `x[mask] = f(y[mask])` is `where(mask, f(y), x)`. A selected value is therefore translated like
the value that it is selected from, and remembers the mask. Masks are compared as expressions, so `y[v > 0]` and
`y[v > 0]` have one mask. All other uses of a selected value are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from snnfx.lowering.aten_recording import AtenCall, LoweringRefused, RecordedValue, ValueReference
from snnfx.lowering.elementwise.expressions import Builder, Expression

__all__ = ["SelectedValues"]


class SelectedValues:
    """The values of a recording that are selected by masks.

    Args:
        values: the recorded values.
        builder: makes expressions.
        expression: the expression of a value.
    """

    def __init__(self, values: list[RecordedValue], builder: Builder, expression: Callable[[int], Expression]) -> None:
        self.values, self.builder, self.expression = values, builder, expression
        self._masks: dict[int, Expression] = {}

    def mask_of(self, number: int) -> Expression | None:
        """The mask by which a value is selected; None if it is not."""
        if not self.values[number].has_selected_size:
            return None
        self.expression(number)
        return self._masks.get(number)

    def translated(self, number: int, call: AtenCall) -> Expression | None:
        """The expression of a read or write by a mask; None for other calls."""
        if call.traits.selection == "reads":
            source, mask = self._source_and_mask(call)
            self._masks[number] = mask
            return self.expression(source)
        if call.traits.selection == "writes":
            return self._written(call)
        return None

    def mark(self, number: int, call: AtenCall) -> bool:
        """Mark the result of an element-wise call on selected values; return whether an operand is selected."""
        operands = list(dict.fromkeys(call.references()))
        masks = {id(m): m for m in map(self.mask_of, operands) if m is not None}
        if not masks:
            return False
        others = [r for r in operands if self.mask_of(r) is None and self.values[r].shape]
        if len(masks) > 1 or others:
            raise LoweringRefused(f"`{call.name}` combines `x[mask]` with values that another mask selects, or none")
        self._masks[number] = next(iter(masks.values()))
        return True

    def _source_and_mask(self, call: AtenCall) -> tuple[int, Expression]:
        source, index = call.args[0], call.args[1]
        mask = index[0] if isinstance(index, list | tuple) and len(index) == 1 else index
        if not isinstance(mask, ValueReference) or self.values[mask.number].dtype != torch.bool:
            raise LoweringRefused(f"`{call.name}` is not known to be element-wise")
        if self.values[mask.number].shape != self.values[source.number].shape:
            raise LoweringRefused(f"`{call.name}` has a mask of another shape than the tensor")
        return source.number, self.expression(mask.number)

    def _written(self, call: AtenCall) -> Expression:
        source, mask = self._source_and_mask(call)
        before, dtype = self.expression(source), self.expression(source).dtype
        value = self.builder.cast(self._value(call, call.args[2], mask), dtype)
        accumulate = call.args[3] if len(call.args) > 3 else call.kwargs.get("accumulate", False)
        if accumulate:
            value = self.builder.make("add", (before, value), dtype)
        return self.builder.make("where", (mask, value, before), dtype)

    def _value(self, call: AtenCall, value: Any, mask: Expression) -> Expression:
        """The expression of a written value, which the same mask selects or which is one number."""
        number = value.number
        expression = self.expression(number)
        is_number = expression.op == "constant" or self.values[number].shape in ((), (1,))
        if self.mask_of(number) is not mask and not is_number:
            raise LoweringRefused(f"`{call.name}` writes values that its mask does not select")
        return expression
