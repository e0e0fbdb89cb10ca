"""One sequence on its way through a rule: what comes in, and what has come of it so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from snnfx.errors import InputError
from snnfx.online.learning_rules import Rule
from snnfx.online.losses import Loss
from snnfx.online.rule_nets import RuleNets
from snnfx.online.updates import Updates
from snnfx.sandbox.torch_internals import pytree

__all__ = ["SequenceRun", "State", "detached", "with_gradient"]

State = dict[str, Any] | None


@dataclass
class SequenceRun:
    """One sequence: what comes in, and what has come of it so far.

    Args:
        rule: the rule.
        nets: the model in the forms that the rule needs.
        leaves: the tensors of the inputs, time first.
        varying: of each, whether it has time.
        given: carried arguments of the first step.
        T: number of time steps.
        target: with time in front, or without time.
        target_has_time: which of the two.
        state: the state so far, detached.
        loss: of one step.
        scale: what each step's loss is multiplied with.
        updates: does the updates.
        keep_outputs: whether outputs are wanted afterwards.
        progress: called with `(steps done, T, loss so far)`.
    """

    rule: Rule
    nets: RuleNets
    leaves: list[Tensor]
    varying: list[bool]
    given: dict[str, Any]
    T: int
    target: Any
    target_has_time: bool
    state: State
    loss: Loss
    scale: float
    updates: Updates
    keep_outputs: bool = False
    progress: Callable[[int, int, Tensor], None] | None = None
    update_count: int = 0
    parts: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device if self.leaves else torch.device("cpu")

    @property
    def total(self) -> Tensor:
        """The loss so far, scaled; detached."""
        return torch.cat(self.losses).sum() * self.scale

    def inputs(self, start: int, stop: int) -> list[Tensor]:
        """The inputs of some steps."""
        return [x[start:stop] if v else x for x, v in zip(self.leaves, self.varying, strict=True)]

    def inputs_at(self, t: int) -> list[Tensor]:
        """The inputs of one step."""
        return [x[t] if v else x for x, v in zip(self.leaves, self.varying, strict=True)]

    def targets(self, index: Any) -> Any:
        """The targets of a slice of the steps, or of one."""
        if not self.target_has_time:
            return self.target
        if isinstance(self.target, Tensor):
            return self.target[index]
        return pytree.tree_map_only(Tensor, lambda v: v[index], self.target)

    def carried(self, t: int) -> dict[str, Any]:
        """The carried arguments of the step t; later ones are in the state."""
        return self.given if t == 0 else {}

    def finish_steps(self, state: State, losses: Tensor, outputs: Any, done: int) -> None:
        """Note down what some steps gave."""
        self.state = (
            None if state is None else {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}
        )
        self.losses.append(losses.detach().reshape(-1))
        if self.keep_outputs:
            self.parts.append(detached(outputs))
        if self.progress is not None:
            self.progress(done, self.T, self.total)

    def outputs(self) -> Any:
        """The outputs of all steps, `[T, N, *]`; None if they were not kept."""
        if not self.parts:
            return None
        leaves, specs = zip(*(pytree.tree_flatten(part) for part in self.parts), strict=True)
        joined = [
            torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)
        ]
        return pytree.tree_unflatten(joined, specs[0])


def detached(tree: Any) -> Any:
    """The same values without their history."""
    if isinstance(tree, Tensor):
        return tree.detach()
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def with_gradient(loss: Tensor) -> Tensor:
    """A loss that a backward pass can start from.

    Raises:
        InputError: SNNFX611.
    """
    if not loss.requires_grad:
        raise InputError(
            "SNNFX611",
            "the loss does not depend on a parameter that requires a gradient",
            why="no backward pass can start from it.",
            hint="Compute it from the outputs, without detach() or item(), and train at least one parameter they use.",
        )
    return loss
