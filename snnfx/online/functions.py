"""Online training in one call: the functions that SpikingJelly documents, for any model that can be converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fptt_online_training", "fptt_online_training_init_w_ra", "ottt_online_training"]


def fptt_online_training_init_w_ra(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The running averages that `fptt_online_training` starts from: a copy of every parameter of the optimizer.

    Returns:
        A list in the order of the optimizer's parameters, `[p for group in optimizer.param_groups for p in
        group["params"]]`. The copies are detached and share no memory with the parameters.
    """
    raise NotImplementedError


def fptt_online_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_seq: Any,
    target_seq: Any,
    f_loss_t: Callable[[Any, Any], Tensor],
    alpha: float,
    w_ra: list[Tensor],
    variant: str = "reference",
) -> None:
    """Train on one batch of sequences with FPTT, an update at every step.

    Args:
        model: a converted net, or any single-step model that `snnfx.convert` accepts.
        optimizer: over the parameters to train. Frozen parameters and those without a gradient are left alone.
        x_seq: `[T, N, *]`.
        target_seq: `[T, N, *]`.
        f_loss_t: `f_loss_t(y_t, target_t)`, a scalar.
        alpha: strength of the regulariser, above 0.
        w_ra: from `fptt_online_training_init_w_ra`; its elements are replaced by the new running averages.
        variant: "reference", "paper" or "authors", see `snnfx.online.FPTTTerm`.

    State: a single-step model starts from the state its modules are in and is left with the final state, detached, as
    by SpikingJelly's function: call `reset_net(model)` before the next sequence. A converted net starts from the reset
    state and keeps nothing, unless it carries its state (`carry_state=True` or `step_mode="s"`).
    Gradients are None afterwards.

    Raises:
        InputError: before the first update: SNNFX610 (lengths differ), SNNFX611 (the loss is not a scalar), SNNFX612
            (the optimizer's parameters are not the model's), SNNFX613 (`w_ra` does not fit), SNNFX309.

    Source: Kag & Saligrama 2021, ICML; Yin et al. 2021, arXiv:2112.11231; SpikingJelly 2.0.0's function of that name,
    to whose numbers the variant "reference" is equal.
    """
    raise NotImplementedError


def ottt_online_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_seq: Tensor,
    target_seq: Tensor,
    f_loss_t: Callable[[Any, Any], Tensor],
    online: bool,
) -> tuple[Tensor, Tensor]:
    """Train on one batch of sequences with OTTT.

    Every weight op of the model gets the eligibility trace of its own operand, the network's input excepted; no special
    modules are needed. Models made of SpikingJelly's OTTT modules (`OTTTLIFNode`, `OTTTSequential`) get the leak of
    the emitting neuron, as those modules have it, and those with `SLTTLIFNode` no trace.

    Args:
        model: a converted net, or any single-step model that `snnfx.convert` accepts.
        optimizer: over the parameters to train.
        x_seq: `[B, T, *]`.
        target_seq: `[B, T, *]`.
        f_loss_t: `f_loss_t(y_t, target_t)`, a scalar; it is not divided by T here. Where a step returns a tuple, its
            first element is `y_t`.
        online: True: an update at every step (OTTT-O); False: one update after the sequence (OTTT-A).

    Returns:
        `(batch_loss, y_all)`: the sum of the steps' losses and the outputs `[B, T, *]`, both detached.

    State: as for `fptt_online_training`. Gradients: set to None before those of an update are taken, and left in place
    after the last one.

    Raises:
        InputError: before the first update: SNNFX610 (lengths differ), SNNFX611 (the loss is not a scalar), SNNFX612
            (the optimizer's parameters are not the model's).

    Source: Xiao et al. 2022, arXiv:2210.04195; SpikingJelly 2.0.0's function of that name, to whose numbers this is
    equal on models with its OTTT modules.
    """
    raise NotImplementedError
