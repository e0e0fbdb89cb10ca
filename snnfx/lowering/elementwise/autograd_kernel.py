"""Autograd function of a generated kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.lowered_step import LoweredStep, Needs
from snnfx.ops.batched_gradients import for_each_gradient
from snnfx.ops.first_derivatives import refuse_second_derivative

__all__ = ["run_lowered"]


def run_lowered(
    lowered: LoweredStep,
    x_seq: Sequence[Tensor],
    states: Sequence[Tensor | float],
    constants: Sequence[Tensor],
    needs: Needs | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run a sequence through the kernels of a step: `(outputs [T, N, *], final states [N, *])`.

    Args:
        lowered: the step.
        x_seq: the inputs, `[T, *]` each.
        states: the states before the first step: numbers, or tensors that can be expanded to `[N, *]`.
        constants: the constants of the step.
        needs: the gradients that are needed (`needs_of`); None for inference.
    """
    count = len(lowered.step.expressions.outputs)
    if needs is None:
        outputs, finals, _, _ = lowered.forward(x_seq, states, constants, None)
        return tuple(outputs), tuple(finals)
    numbers = [None if isinstance(s, Tensor) else float(s) for s in states]
    tensors = [s for s in states if isinstance(s, Tensor)]
    results = _KernelFunction.apply(lowered, needs, numbers, len(x_seq), *x_seq, *tensors, *constants)
    return results[:count], results[count:]


def needs_of(x_seq: Sequence[Tensor], states: Sequence[Tensor | float], constants: Sequence[Tensor]) -> Needs | None:
    """The gradients that are needed; None if there are none."""
    needs = Needs(
        tuple([x.requires_grad for x in x_seq]),
        tuple([isinstance(s, Tensor) and s.requires_grad for s in states]),
        tuple([c.requires_grad for c in constants]),
    )
    return needs if any(needs.sequences) or any(needs.states) or any(needs.constants) else None


class _KernelFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lowered: LoweredStep, needs: Needs, numbers: list[float | None], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x_seq, rest = tensors[:count], list(tensors[count:])
        states: list[Tensor | float] = [rest.pop(0) if n is None else n for n in numbers]
        outputs, finals, saved, context = lowered.forward(x_seq, states, rest, needs)
        plan = lowered.training(needs).plan
        inputs = [x_seq[i] for i in plan.inputs]
        initials = [states[k] for k in plan.earlier if isinstance(states[k], Tensor)]
        ctx.lowered, ctx.context, ctx.numbers = lowered, context, numbers
        ctx.counts = (len(inputs), len(initials), len(rest))
        ctx.shapes = ([x.shape for x in x_seq], [s.shape if isinstance(s, Tensor) else () for s in states])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *initials, *rest, *saved)
        constant = [r for r, d in zip((*outputs, *finals), lowered.step.differentiable, strict=True) if not d]
        if constant:
            ctx.mark_non_differentiable(*constant)
        return (*outputs, *finals)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        hint = "Convert with lower=None: PyTorch then runs the loop and differentiates twice."
        refuse_second_derivative("a kernel", hint)
        lowered, context = ctx.lowered, ctx.context
        tensors = list(ctx.saved_tensors)
        n_inputs, n_initials, n_constants = ctx.counts
        inputs, initials = tensors[:n_inputs], tensors[n_inputs : n_inputs + n_initials]
        constants = tensors[n_inputs + n_initials : n_inputs + n_initials + n_constants]
        saved = tensors[n_inputs + n_initials + n_constants :]
        plan = lowered.training(context.needs).plan
        x_seq: list[Tensor | None] = [None] * len(ctx.shapes[0])
        for i, x in zip(plan.inputs, inputs, strict=True):
            x_seq[i] = x
        states: list[Tensor | None] = [None] * len(ctx.shapes[1])
        from_tensors = iter(initials)
        for k in plan.earlier:
            states[k] = next(from_tensors) if ctx.numbers[k] is None else None
        count, numbers, shapes = len(lowered.step.expressions.outputs), ctx.numbers, ctx.shapes

        def backward(of_results: Sequence[Tensor | None]) -> list[Tensor | None]:
            with torch.no_grad():
                grad_x, grad_states, grad_constants = lowered.backward(
                    context, x_seq, states, constants, saved, of_results[:count], of_results[count:], shapes
                )
            of_states = [g for g, number in zip(grad_states, numbers, strict=True) if number is None]
            return [*grad_x, *of_states, *grad_constants]

        return (None, None, None, None, *for_each_gradient(backward, grads))
