"""Gradients of constants (weights), computed outside the reversed loop.

Each step adds `G_t^T X_t` to the gradient of a weight. Summed over all steps this is one product of the stacked values,
`[T*N, out]^T [T*N, in]`, and for a convolution one call with T folded into the batch. Operations that are linear in the
incoming gradient (a transpose, a sum over the batch) run once, on the sum over time. All other gradients are summed in
the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, Recording, resolve_references
from snnfx.lowering.linear_calls import is_linear
from snnfx.lowering.mixed.call_kinds import FunctionalCall
from snnfx.lowering.mixed.gradient_by_events import product_by_events
from snnfx.lowering.mixed.schedule import CallKinds

__all__ = ["ConstantGradient", "plan_gradient"]


@dataclass(frozen=True)
class ConstantGradient:
    """How to compute the sum over time of one value.

    Args:
        how: "sum": summed in the loop; "linear": a call on sums; "product", "convolution": a call on stacked values;
            "repeated": the value is the same at each step.
        number: the value.
        call: the call that computes it.
        operands: for "linear", the operands that depend on gradients.
        stacks: for "product" and "convolution", the values that are needed at all steps.
        by_events: whether a product may visit only the elements of its other operand that are not zero.
    """

    how: str
    number: int
    call: AtenCall | None = None
    operands: tuple[ConstantGradient, ...] = ()
    stacks: tuple[int, ...] = ()
    by_events: bool = False

    def parts(self) -> Iterator[ConstantGradient]:
        """This sum and, recursively, the sums that it is computed from."""
        yield self
        for operand in self.operands:
            yield from operand.parts()

    def evaluate(
        self,
        recording: Recording,
        T: int,
        sums: dict[int, Tensor],
        stacks: dict[int, Tensor],
        invariants: dict[int, Tensor],
    ) -> Tensor:
        """Compute the sum over time.

        Args:
            recording: the recorded step.
            T: the number of time steps.
            sums: the sums computed so far; the result is added.
            stacks: the values at all steps, `[T, *]`.
            invariants: the values that are the same at each step.
        """
        if self.number in sums:
            return sums[self.number]
        if self.how == "repeated":
            return invariants[self.number] * T
        call = self.call
        assert call is not None, self
        if self.how == "linear":
            known = dict(invariants)
            known.update((d.number, d.evaluate(recording, T, sums, stacks, invariants)) for d in self.operands)
            total = FunctionalCall.of(call, [self.number], recording).on(known)[0]
        elif self.how == "product":
            total = self._product(recording, *(stacks[n] for n in self.stacks))
        else:
            total = _convolution(recording, call, self.number, stacks, invariants)
        sums[self.number] = total
        return total

    def _product(self, recording: Recording, a: Tensor, b: Tensor) -> Tensor:
        """The sum over time of `a_t @ b_t`."""
        total = None
        if self.by_events and a.dim() == 3:
            if recording.values[self.stacks[0]].depends_on_grad:
                total = product_by_events(b, a.mT)
            else:
                total = product_by_events(a.mT, b)
                total = None if total is None else total.mT
        return _product(a, b) if total is None else total


def plan_gradient(recording: Recording, kinds: CallKinds, number: int, by_events: bool) -> ConstantGradient:
    """Plan the sum over time of a value of the backward pass.

    Args:
        recording: the recorded step.
        kinds: the kinds of its calls.
        number: the value.
        by_events: whether products may visit only the elements of their operands that are not zero.
    """
    values = recording.values
    if not values[number].varying:
        return ConstantGradient("repeated", number)
    call = values[number].call
    if call is None:
        return ConstantGradient("sum", number)
    varying = [r for r in call.references() if values[r].varying]
    grad_operands = [r for r in varying if values[r].depends_on_grad]
    if call.name in ("mm", "bmm") and len(varying) == 2 and len(grad_operands) == 1:
        return ConstantGradient("product", number, call, stacks=tuple(varying), by_events=by_events)
    if (
        call.name == "convolution_backward"
        and len(varying) == 2
        and len(grad_operands) == 1
        and _is_of_constant(call, number)
    ):
        return ConstantGradient("convolution", number, call, stacks=tuple(varying))
    is_floating = values[number].dtype.is_floating_point
    if not is_linear(call, values) or not is_floating or call.results != [number]:
        return ConstantGradient("sum", number)
    operands = tuple(plan_gradient(recording, kinds, r, by_events) for r in dict.fromkeys(grad_operands))
    if kinds.of(call) == "fused" and all(operand.how == "sum" for operand in operands):
        return ConstantGradient("sum", number)  # a fused kernel of the loop computes the operands anyway
    return ConstantGradient("linear", number, call, operands)


def _is_of_constant(call: AtenCall, number: int) -> bool:
    """Whether a result of `convolution_backward` is the gradient of the weight or of the bias."""
    return call.positions[call.results.index(number)] > 0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The sum over time of `a_t @ b_t`, as one product that contracts over time as well."""
    T = a.shape[0]
    if a.dim() == 3:
        return torch.mm(a.permute(1, 0, 2).reshape(a.shape[1], T * a.shape[2]), b.reshape(T * b.shape[1], b.shape[2]))
    left = a.permute(1, 2, 0, 3).reshape(a.shape[1], a.shape[2], T * a.shape[3])
    return torch.bmm(left, b.permute(1, 0, 2, 3).reshape(b.shape[1], T * b.shape[2], b.shape[3]))


def _convolution(
    recording: Recording, call: AtenCall, number: int, stacks: dict[int, Tensor], invariants: dict[int, Tensor]
) -> Tensor:
    """The sum over time of the gradient of a weight or bias, with T folded into the batch."""
    if call.positions[call.results.index(number)] == 2:
        grad = stacks[call.args[0].number]
        return grad.sum((0, 1, *range(3, grad.dim())))
    functional = FunctionalCall.of(call, [number], recording)
    grad, x = (stacks[a.number].flatten(0, 1) for a in call.args[:2])
    return functional([grad, x, *(resolve_references(a, invariants) for a in functional.args[2:])], {})[0]
