"""`Trainer`: run a learning rule on sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.online.rules import Rule

__all__ = ["StepResult", "Trainer"]

Loss = Callable[[Any, Any], Tensor]
"""The loss of one step: `loss(y_t, target_t)` is a scalar tensor."""


@dataclass(frozen=True)
class StepResult:
    """What one call of `Trainer.step` did.

    Args:
        loss: the sum of the steps' losses, each times the loss scale, without regularisers; detached.
        updates: how many optimizer steps were taken.
        state: the state after the last step, detached; pass it to the next call to go on with the sequence.
        outputs: `y_seq`, `[T, N, *]`, detached; None unless asked for.
        metrics: the value of each metric.
        grad_norm: the norm of the gradients before clipping at the last update; None without clipping.
    """

    loss: Tensor
    updates: int
    state: dict[str, Any]
    outputs: Any = None
    metrics: dict[str, Any] = field(default_factory=dict)
    grad_norm: Tensor | None = None


class Trainer:
    """Train a model with a learning rule, one batch of sequences at a time.

    Args:
        model: a converted net, any single-step model that `snnfx.convert` accepts, or a DistributedDataParallel of one.
        rule: a `snnfx.online.Rule`.
        optimizer: over parameters of the model. Schedulers work on it as usual: call them between calls of `step`.
        loss: `loss(y_t, target_t)`, the scalar loss of one time step; a pure function. It is evaluated for all steps
            of a chunk at once (torch.vmap) where that gives the same values and gradients, which is checked once.
        chunk: how many time steps are run at once; bounds the memory. None: chosen by the rule (see `chunk_length`).
            The numbers do not depend on it, except for "keep" rules, which take all steps at once, and TBPTT, whose
            chunk is K.
        loss_scale: overrides that of the rule: "mean": divide each step's loss by T; "sum": do not; or a number.
        clip_grad_norm: largest norm of the gradients at an update, over the optimizer's parameters together.
        amp_dtype: run the forward pass under torch.autocast with this type (torch.bfloat16 or torch.float16; the
            latter with a gradient scaler).
        metrics: `{name: f(y_seq, target)}`, evaluated after the sequence on the detached outputs `[T, N, *]` and the
            target as it was given.
        target_dim: where T is in the target; None: the same target at every step.
        batch_norm: "per_step": statistics of one step at a time, as an online rule sees them; "fold": over all steps
            of a chunk, as `snnfx.convert` does.
        accumulate: take an update every so many calls of `step` (rules that update at the end of a sequence only). The
            gradients of the calls are averaged.
        process_group: average gradients over the processes of this group before each update; "world": over all. Taken
            from a DistributedDataParallel model.
        progress: called after each chunk with `(steps done, T, loss so far)`.
        example_inputs: for a model that is not converted yet, as for `snnfx.convert`; default: the first step of the
            first sequence.

    BatchNorm: see `batch_norm`. Dropout: see `Rule.dropout`. State: each call of `step` starts from the reset state
    (or the one given) and leaves nothing behind in the model. `zero_grad`: gradients are set to None (or left to
    `optimizer.zero_grad`'s default) before the first backward pass that belongs to an update, and stay after the
    update, so they can be looked at.

    Raises:
        InputError: before anything is changed: SNNFX612 (the optimizer's parameters are not the model's), SNNFX614 (a
            number of steps out of range), SNNFX615 (the leak of a trace is not one number), SNNFX616 (the rule does not
            apply to the model), SNNFX309.

    Example:
        >>> import torch, snnfx
        >>> from snnfx.online import SLTT, Trainer
        >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode()))
        >>> trainer = Trainer(net, SLTT, torch.optim.Adam(net.parameters()), torch.nn.functional.cross_entropy,
        ...                   target_dim=None)
        >>> trainer.step(torch.rand(6, 4, 3), torch.tensor([0, 1, 1, 0])).updates
        1
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        chunk: int | None = None,
        loss_scale: str | float | None = None,
        clip_grad_norm: float | None = None,
        amp_dtype: torch.dtype | None = None,
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        target_dim: int | None = 0,
        batch_norm: str = "per_step",
        accumulate: int = 1,
        process_group: Any = None,
        progress: Callable[[int, int, Tensor], None] | None = None,
        example_inputs: Any = None,
    ) -> None:
        raise NotImplementedError

    def step(
        self, x_seq: Any, target: Any, *, state: dict[str, Any] | None = None, return_outputs: bool = False
    ) -> StepResult:
        """Train on one batch of sequences.

        Args:
            x_seq: `[T, N, *]`, or a tuple of the model's inputs.
            target: `[T, N, *]` (see `target_dim`), or nested; what the loss takes, with time.
            state: the state before the first step, as `StepResult.state`; None: the reset state.
            return_outputs: whether the result holds the outputs of all steps.

        Raises:
            InputError: before the first update: SNNFX610 (lengths differ), SNNFX611 (the loss is not a scalar),
                SNNFX614 (`random_steps` above T), and those of `Net.run`.
        """
        raise NotImplementedError
