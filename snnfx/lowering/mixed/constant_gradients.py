"""Gradients of constants, taken out of the reversed loop.

What every step adds to the gradient of a weight is `G_t^T X_t`: summed over all steps that is one product of the
stacks, `[T*N, out]^T [T*N, in]`, and for a convolution one call with T folded into the batch. What is linear in the
gradient from above (a transpose, a sum over the batch) is done once, on the sum over time. Everything else is added up
in the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, Recording
from snnfx.lowering.mixed.call_kinds import LINEAR, Pure, resolved
from snnfx.lowering.mixed.schedule import Kinds

__all__ = ["Deferred", "plan_gradient"]


@dataclass(frozen=True)
class Deferred:
    """How the sum over time of one value is computed.

    Args:
        how: "sum": added up in the loop; "linear": a call on sums; "product", "convolution": a call on stacks.
        number: the value.
        call: that computes it; None for "sum".
        operands: for "linear", its operands that depend on gradients.
        stacks: for the last two, the values that are needed at all steps.
    """

    how: str
    number: int
    call: AtenCall | None = None
    operands: tuple[Deferred, ...] = ()
    stacks: tuple[int, ...] = ()

    def parts(self) -> Iterator[Deferred]:
        """This and all that it is computed from."""
        yield self
        for operand in self.operands:
            yield from operand.parts()

    def value(
        self, recording: Recording, sums: dict[int, Tensor], stacks: dict[int, Tensor], invariants: dict[int, Tensor]
    ) -> Tensor:
        """The sum over time, from those that the loop has added up and from stacks `[T, *]`."""
        if self.number in sums:
            return sums[self.number]
        call = self.call
        assert call is not None, self
        if self.how == "linear":
            known = dict(invariants)
            known.update((d.number, d.value(recording, sums, stacks, invariants)) for d in self.operands)
            pure = Pure(call, [self.number], recording)
            found = pure([resolved(a, known) for a in pure.args], resolved(call.kwargs, known))[0]
        elif self.how == "product":
            found = _product(*(stacks[n] for n in self.stacks))
        else:
            found = _convolution(recording, call, self.number, stacks, invariants)
        sums[self.number] = found
        return found


def plan_gradient(recording: Recording, kinds: Kinds, number: int) -> Deferred:
    """How the sum over time of a value of the backward pass is computed."""
    values = recording.values
    call = values[number].call
    if call is None:
        return Deferred("sum", number)
    varying = [r for r in call.references() if values[r].varying]
    above = [r for r in varying if values[r].tangential]
    if call.name in ("mm", "bmm") and len(varying) == 2 and len(above) == 1:
        return Deferred("product", number, call, stacks=tuple(varying))
    if call.name == "convolution_backward" and len(varying) == 2 and len(above) == 1 and _is_of_constant(call, number):
        return Deferred("convolution", number, call, stacks=tuple(varying))
    if call.name in ("add", "sub", "cat", "stack"):
        is_linear = len(above) == len(call.references()) > 1
    else:
        is_linear = call.name in LINEAR and varying == above and len(above) == 1
    if call.name == "div":
        is_linear = is_linear and getattr(call.args[0], "number", None) in above
    if not is_linear or not values[number].dtype.is_floating_point or call.results != [number]:
        return Deferred("sum", number)
    operands = tuple(plan_gradient(recording, kinds, r) for r in dict.fromkeys(above))
    if kinds.of(call) == "fused" and all(operand.how == "sum" for operand in operands):
        return Deferred("sum", number)  # a kernel has it at hand
    return Deferred("linear", number, call, operands)


def _is_of_constant(call: AtenCall, number: int) -> bool:
    """Whether a result of `convolution_backward` is the gradient of the weight or of the bias."""
    return call.places[call.results.index(number)] > 0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The sum over time of `a_t @ b_t`: one product over the steps and the dimension that each product is over."""
    T = a.shape[0]
    if a.dim() == 3:
        return torch.mm(a.permute(1, 0, 2).reshape(a.shape[1], T * a.shape[2]), b.reshape(T * b.shape[1], b.shape[2]))
    left = a.permute(1, 2, 0, 3).reshape(a.shape[1], a.shape[2], T * a.shape[3])
    return torch.bmm(left, b.permute(1, 0, 2, 3).reshape(b.shape[1], T * b.shape[2], b.shape[3]))


def _convolution(
    recording: Recording, call: AtenCall, number: int, stacks: dict[int, Tensor], invariants: dict[int, Tensor]
) -> Tensor:
    pure = Pure(call, [number], recording)
    grad, x = (stacks[a.number].flatten(0, 1) for a in call.args[:2])
    return pure([grad, x, *(resolved(a, invariants) for a in pure.args[2:])], {})[0]
