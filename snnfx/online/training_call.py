"""One call of `Trainer.step`: its sequence, the current state, and the losses and outputs so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from snnfx.errors import InputError
from snnfx.online.edited_nets import EditedNets
from snnfx.online.learning_rules import Rule
from snnfx.online.losses import Loss
from snnfx.online.updates import Updates
from snnfx.sandbox.torch_internals import pytree

__all__ = ["State", "TrainingCall", "detached_state", "require_differentiable"]

State = dict[str, Any] | None


@dataclass
class TrainingCall:
    """One sequence being trained on.

    Args:
        rule: the learning rule.
        nets: the nets that the rule runs.
        leaves: the input tensors, with time in dim 0.
        input_has_time: for each input tensor, whether it has a time dimension.
        initial_arguments: carried arguments of the model at the first step.
        T: number of time steps.
        target: with time in dim 0, or the same at every step.
        target_has_time: whether the target has a time dimension.
        state: the current state by slot, detached.
        loss: the loss of one step.
        scale: factor on the loss of each step.
        updates: accumulates gradients and runs the optimizer.
        keep_outputs: whether to collect the outputs.
        progress: called with `(steps done, T, loss so far)`.
    """

    rule: Rule
    nets: EditedNets
    leaves: list[Tensor]
    input_has_time: list[bool]
    initial_arguments: dict[str, Any]
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
    output_chunks: list[Any] = field(default_factory=list)
    loss_chunks: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.leaves[0].device if self.leaves else torch.device("cpu")

    @property
    def total_loss(self) -> Tensor:
        """The scaled sum of the losses so far, detached."""
        return torch.cat(self.loss_chunks).sum() * self.scale

    def inputs(self, start: int, stop: int) -> list[Tensor]:
        """The inputs of the steps from `start` to `stop`."""
        return [x[start:stop] if varies else x for x, varies in zip(self.leaves, self.input_has_time, strict=True)]

    def inputs_at(self, t: int) -> list[Tensor]:
        """The inputs of step `t`."""
        return [x[t] if varies else x for x, varies in zip(self.leaves, self.input_has_time, strict=True)]

    def targets(self, index: Any) -> Any:
        """The target of one step, or of a slice or a tensor of steps."""
        if not self.target_has_time:
            return self.target
        if isinstance(self.target, Tensor):
            return self.target[index]
        return pytree.tree_map_only(Tensor, lambda v: v[index], self.target)

    def carried(self, t: int) -> dict[str, Any]:
        """The carried arguments that the caller passed for step `t`; after the first step they are in the state."""
        return self.initial_arguments if t == 0 else {}

    def finish_steps(self, state: State, losses: Tensor, outputs: Any, done: int) -> None:
        """Record the results of some steps.

        Args:
            state: the state after them.
            losses: one per step.
            outputs: with time in dim 0.
            done: the number of steps of the sequence that are done.
        """
        self.state = detached_state(state)
        self.loss_chunks.append(losses.detach().reshape(-1))
        if self.keep_outputs:
            self.output_chunks.append(_detached(outputs))
        if self.progress is not None:
            self.progress(done, self.T, self.total_loss)

    def outputs(self) -> Any:
        """The outputs of all steps, `[T, N, *]`; None if they were not collected."""
        if not self.output_chunks:
            return None
        leaves, specs = zip(*(pytree.tree_flatten(chunk) for chunk in self.output_chunks), strict=True)
        joined = [
            torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)
        ]
        return pytree.tree_unflatten(joined, specs[0])


def detached_state(state: State) -> State:
    """Detach the state from the autograd graph."""
    return None if state is None else {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}


def _detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def require_differentiable(loss: Tensor) -> Tensor:
    """Return the loss if it requires a gradient.

    Raises:
        InputError: SNNFX611 if it does not.
    """
    if not loss.requires_grad:
        raise InputError(
            "SNNFX611",
            "the loss does not depend on a parameter that requires a gradient",
            why="backpropagation cannot start from it.",
            hint="Compute it from the model's outputs, without detach() or item(), and train at least one parameter "
            "that they depend on.",
        )
    return loss
