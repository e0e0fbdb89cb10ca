"""The terms that FPTT adds to the loss of every step, and the running averages behind them.

With the weights W, their running average A, and g the gradient of the last loss at the weights of then:

    reference  dW = dl + alpha (W - A - g / 2 alpha) / n       A = (A + W) / 2 - g' / 2 alpha    n: elements of W
    paper      dW = dl + alpha (W - A - g / 2 alpha)           A = (A + W) / 2 - g' / 2 alpha
    authors    dW = dl - m + alpha (W - A)                     m = m - alpha (W - A); A = (A + W) / 2 - m / 2 alpha

where g' is the gradient of the same loss at the new weights, which is g in the next step. The regulariser's gradient is
added in closed form; in the first two rows `A + g / 2 alpha` is the middle between the last A and W, which is what is
kept. Kag & Saligrama 2021, eq. 4 and algorithm 1; the "reference" is SpikingJelly 2.0.0's function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.online.learning_rules import FPTTTerm
from snnfx.online.updates import Updates
from snnfx.sandbox.torch_internals import (
    foreach_add,
    foreach_add_,
    foreach_lerp,
    foreach_mul_,
    foreach_sub,
    foreach_sub_,
)

__all__ = ["FPTTSequence"]


class FPTTSequence:
    """FPTT's updates over one sequence.

    Args:
        term: strength and variant.
        updates: does the updates.
        averages: one for each parameter of the optimizer; elements are replaced by the new running averages.
    """

    def __init__(self, term: FPTTTerm, updates: Updates, averages: list[Tensor]) -> None:
        self.term, self.updates, self.averages = term, updates, averages
        self.trained = [(i, p) for i, p in enumerate(updates.parameters) if p.requires_grad]
        self.middles: dict[int, Tensor] = {}
        self.multipliers: dict[int, Tensor] = {}

    def update(
        self,
        loss: Tensor,
        is_last: bool,
        before: Any,
        after: Any,
        step_again: Callable[[Any], tuple[Any, Any, Tensor, Tensor]],
    ) -> None:
        """One step's update, and the running averages after it.

        Args:
            loss: of the step, with its graph.
            is_last: whether it is the last step of the sequence.
            before, after: the states before and after the step.
            step_again: takes the step once more from a given state; the last of what it returns is the loss.
        """
        parameters = [p for _, p in self.trained]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        used = [(i, p, g) for (i, p), g in zip(self.trained, found, strict=True) if g is not None]
        index = [i for i, _, _ in used]
        weights: list[Tensor] = [p for _, p, _ in used]
        alpha = self.term.alpha
        self.updates.zero()
        with torch.no_grad():
            gradients = self._with_pulls(index, weights, [g for _, _, g in used])
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
        self.updates.apply()
        if self.term.variant == "authors":
            with torch.no_grad():
                self._follow_multipliers(index, weights, alpha)
            return
        if is_last and self.term.variant == "reference":
            return
        *_, loss = step_again(after if self.term.variant == "reference" else before)
        again = torch.autograd.grad(loss, weights)
        self.updates.average_over_processes(again)
        with torch.no_grad():
            middles = foreach_lerp([self.averages[i] for i in index], weights, 0.5)
            self.middles = dict(zip(index, middles, strict=True))
            self._set_averages(index, foreach_add(middles, again, alpha=-0.5 / alpha))

    def _with_pulls(self, index: list[int], weights: list[Tensor], gradients: list[Tensor]) -> Sequence[Tensor]:
        """The gradients with those of the regulariser."""
        alpha, variant = self.term.alpha, self.term.variant
        pulls = foreach_sub(weights, [self.middles.get(i, self.averages[i]) for i in index])
        if variant == "reference":
            foreach_mul_(pulls, [alpha / p.numel() for p in weights])
        else:
            foreach_mul_(pulls, alpha)
        foreach_add_(pulls, gradients)
        known = [(p, self.multipliers[i]) for p, i in zip(pulls, index, strict=True) if i in self.multipliers]
        if known:
            foreach_sub_([p for p, _ in known], [m for _, m in known])
        return pulls

    def _set_averages(self, index: list[int], averages: Sequence[Tensor]) -> None:
        for i, average in zip(index, averages, strict=True):
            self.averages[i] = average

    def _follow_multipliers(self, index: list[int], weights: list[Tensor], alpha: float) -> None:
        """`m = m - alpha (W - A)`, with the new weights and the running average of before."""
        steps = list(foreach_sub(weights, [self.averages[i] for i in index]))
        foreach_mul_(steps, -alpha)
        for i, step in zip(index, steps, strict=True):
            self.multipliers[i] = self.multipliers[i] + step if i in self.multipliers else step
        averages = foreach_lerp([self.averages[i] for i in index], weights, 0.5)
        multipliers = [self.multipliers[i] for i in index]
        self._set_averages(index, foreach_add(averages, multipliers, alpha=-0.5 / alpha))
