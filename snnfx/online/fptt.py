"""FPTT: the regulariser on the loss of every step, and the running average of the weights.

With the weights W, their running average A, and g, the gradient of the previous step's loss at the weights after that
step's update:

    reference  dW = dl + alpha (W - A - g / 2 alpha) / n       A = (A + W) / 2 - g' / 2 alpha    n: elements of W
    paper      dW = dl + alpha (W - A - g / 2 alpha)           A = (A + W) / 2 - g' / 2 alpha
    authors    dW = dl - m + alpha (W - A)                     m = m - alpha (W - A); A = (A + W) / 2 - m / 2 alpha

g' is the gradient of the current loss at the updated weights; it is the g of the next step. The gradient of the
regulariser is added in closed form. In the first two rows, `A + g / 2 alpha` is the midpoint of the previous A and W,
which is stored in its place. The authors' code never resets m: a sequence starts with the m of the previous one.
Kag & Saligrama 2021, eq. 4 and algorithm 1; "reference" is SpikingJelly 2.0.0's function.
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

__all__ = ["FPTTUpdater"]


class FPTTUpdater:
    """Run FPTT's updates over one sequence.

    Args:
        term: strength and variant of the regulariser.
        updates: runs the optimizer.
        averages: the running average of each parameter of the optimizer; its elements are replaced at every step.
        multipliers: the multiplier m of the authors' form by the index of its parameter; a missing one is 0. Its
            entries are replaced at every step.
    """

    def __init__(
        self, term: FPTTTerm, updates: Updates, averages: list[Tensor], multipliers: dict[int, Tensor]
    ) -> None:
        self.term, self.updates, self.averages, self.multipliers = term, updates, averages, multipliers
        self.trained = [(i, p) for i, p in enumerate(updates.parameters) if p.requires_grad]
        self.midpoints: dict[int, Tensor] = {}

    def update(
        self,
        loss: Tensor,
        is_last: bool,
        before: Any,
        after: Any,
        repeat_step: Callable[[Any], tuple[Any, Any, Tensor, Tensor]],
    ) -> None:
        """Update the weights, then their running averages, for one time step.

        Args:
            loss: the loss of the step, with its autograd graph.
            is_last: whether it is the last step of the sequence.
            before, after: the states before and after the step.
            repeat_step: runs the step from a given state; the last element of its result is the loss.
        """
        parameters = [p for _, p in self.trained]
        loss_gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        used = [(i, p, g) for (i, p), g in zip(self.trained, loss_gradients, strict=True) if g is not None]
        index = [i for i, _, _ in used]
        weights: list[Tensor] = [p for _, p, _ in used]
        alpha = self.term.alpha
        self.updates.clear_gradients()
        with torch.no_grad():
            gradients = self._regularised(index, weights, [g for _, _, g in used])
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
        self.updates.optimizer_step()
        if self.term.variant == "authors":
            with torch.no_grad():
                self._update_multipliers(index, weights, alpha)
            return
        if is_last and self.term.variant == "reference":
            return
        *_, loss = repeat_step(after if self.term.variant == "reference" else before)
        new_gradients = torch.autograd.grad(loss, weights)
        self.updates.average_over_processes(new_gradients)
        with torch.no_grad():
            midpoints = foreach_lerp([self.averages[i] for i in index], weights, 0.5)
            self.midpoints = dict(zip(index, midpoints, strict=True))
            self._set_averages(index, foreach_add(midpoints, new_gradients, alpha=-0.5 / alpha))

    def _regularised(self, index: list[int], weights: list[Tensor], gradients: list[Tensor]) -> Sequence[Tensor]:
        """Add the gradients of the regulariser to the gradients of the loss."""
        alpha, variant = self.term.alpha, self.term.variant
        total = foreach_sub(weights, [self.midpoints.get(i, self.averages[i]) for i in index])
        if variant == "reference":
            foreach_mul_(total, [alpha / p.numel() for p in weights])
        else:
            foreach_mul_(total, alpha)
        foreach_add_(total, gradients)
        with_multiplier = [(p, self.multipliers[i]) for p, i in zip(total, index, strict=True) if i in self.multipliers]
        if with_multiplier:
            foreach_sub_([p for p, _ in with_multiplier], [m for _, m in with_multiplier])
        return total

    def _set_averages(self, index: list[int], averages: Sequence[Tensor]) -> None:
        for i, average in zip(index, averages, strict=True):
            self.averages[i] = average

    def _update_multipliers(self, index: list[int], weights: list[Tensor], alpha: float) -> None:
        """`m = m - alpha (W - A)`, with the updated weights and the old running averages."""
        steps = list(foreach_sub(weights, [self.averages[i] for i in index]))
        foreach_mul_(steps, -alpha)
        for i, step in zip(index, steps, strict=True):
            self.multipliers[i] = self.multipliers[i] + step if i in self.multipliers else step
        averages = foreach_lerp([self.averages[i] for i in index], weights, 0.5)
        multipliers = [self.multipliers[i] for i in index]
        self._set_averages(index, foreach_add(averages, multipliers, alpha=-0.5 / alpha))
