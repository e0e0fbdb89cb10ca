"""Autograd function of a mixed loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.lowered_step import Needs
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.ops.batched_gradients import for_each_gradient
from snnfx.ops.first_derivatives import refuse_second_derivative

__all__ = ["run_mixed"]

_MOST_KEPT_BYTES = 1 << 20
"""Bytes of the values that do not change with time, up to which the forward pass keeps them for backward."""


def run_mixed(
    mixed: MixedStep,
    x_seq: Sequence[Tensor],
    states: Sequence[Tensor | float],
    constants: Sequence[Tensor],
    needs: Needs | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run a sequence: `(outputs [T, N, *], final states [N, *])`.

    Args:
        mixed: the step.
        x_seq: the inputs, `[T, N, *]` each.
        states: the states before the first step: numbers, or tensors that can be expanded to `[N, *]`.
        constants: the constants of the step.
        needs: the gradients that are needed; None for inference.
    """
    if needs is None:
        outputs, finals, _ = mixed.forward(x_seq, states, constants, None)
        return tuple(outputs), tuple(finals)
    numbers = [None if isinstance(s, Tensor) else float(s) for s in states]
    tensors = [s for s in states if isinstance(s, Tensor)]
    results = _Loop.apply(mixed, needs, numbers, len(x_seq), *x_seq, *tensors, *constants)
    count = len(mixed.recording.outputs)
    return results[:count], results[count:]


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: MixedStep, needs: Needs, numbers: list[float | None], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x_seq, rest = tensors[:count], list(tensors[count:])
        states: list[Tensor | float] = [rest.pop(0) if n is None else n for n in numbers]
        invariants = mixed.invariants(rest)
        outputs, finals, saved = mixed.forward(x_seq, states, rest, needs, invariants)
        # Backward computes large ones again instead of keeping their memory.
        ctx.invariants = invariants if sum([t.nbytes for t in invariants.values()]) <= _MOST_KEPT_BYTES else None
        plan = mixed.training(needs).plan
        inputs = [x_seq[i] for i in plan.inputs]
        ctx.mixed, ctx.needs, ctx.T, ctx.numbers = mixed, needs, x_seq[0].shape[0], numbers
        ctx.counts = (count, len(inputs), len(rest))
        ctx.shapes = [s.shape if isinstance(s, Tensor) else () for s in states]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *rest, *saved)
        constant = [r for r, d in zip((*outputs, *finals), mixed.differentiable, strict=True) if not d]
        if constant:
            ctx.mark_non_differentiable(*constant)
        return (*outputs, *finals)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        what = "a loop that runs without autograd"
        refuse_second_derivative(what, "Convert with lower=None: PyTorch then runs the loop and differentiates twice.")
        mixed, needs = ctx.mixed, ctx.needs
        n_sequences, n_inputs, n_constants = ctx.counts
        tensors = list(ctx.saved_tensors)
        x_seq: list[Tensor | None] = [None] * n_sequences
        for i, x in zip(mixed.training(needs).plan.inputs, tensors[:n_inputs], strict=True):
            x_seq[i] = x
        constants = tensors[n_inputs : n_inputs + n_constants]
        saved = tensors[n_inputs + n_constants :]
        count, T, shapes, numbers = len(mixed.recording.outputs), ctx.T, ctx.shapes, ctx.numbers
        invariants = ctx.invariants

        def backward(of_results: Sequence[Tensor | None]) -> list[Tensor | None]:
            grad_x, grad_states, grad_constants = mixed.backward(
                needs, T, x_seq, constants, saved, of_results[:count], of_results[count:], invariants
            )
            of_states = [
                None if g is None else g.sum_to_size(shape)
                for g, shape, number in zip(grad_states, shapes, numbers, strict=True)
                if number is None
            ]
            return [*grad_x, *of_states, *grad_constants]

        return (None, None, None, None, *for_each_gradient(backward, grads))
