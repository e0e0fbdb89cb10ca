"""Online training with the function signatures of SpikingJelly, for any convertible model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.online.call_checks import check_averages
from snnfx.online.inputs import example_of_one_step, moved_to_time_dim, output_time_dim
from snnfx.online.learning_rules import FPTT, OTTT_A, Rule
from snnfx.online.model_state import read_model_state, write_model_state
from snnfx.online.trainer import StepResult, Trainer
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import outputs_without

__all__ = ["fptt_online_training", "fptt_online_training_init_w_ra", "ottt_online_training"]


def fptt_online_training_init_w_ra(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Create the initial running averages `w_ra` for `fptt_online_training`: copies of the parameters.

    Returns:
        A list in the order of the optimizer's parameters, `[p for group in optimizer.param_groups for p in
        group["params"]]`. The copies are detached and share no memory with the parameters.
    """
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


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
    """Train on one batch of sequences with FPTT, updating at every step.

    Args:
        model: a converted net, or any single-step model that `snnfx.convert` accepts.
        optimizer: over the parameters to train. Frozen parameters and parameters without a gradient do not change.
        x_seq: `[T, N, *]`.
        target_seq: `[T, N, *]`.
        f_loss_t: the loss of one step, `f_loss_t(y_t, target_t)`, a scalar.
        alpha: strength of the regulariser, above 0.
        w_ra: running averages from `fptt_online_training_init_w_ra`; updated in place (the elements of the list).
        variant: "reference", "paper" or "authors", see `snnfx.online.FPTTTerm`. `w_ra` does not store the multipliers
            of "authors", which restart at each call. A `Trainer` keeps them.

    State: as with SpikingJelly's function, a single-step model starts from the state stored in its modules and ends
    with the final state in them, detached; call `reset_net(model)` before the next sequence. A converted net starts
    from the reset state and stores nothing, unless it carries state across calls (`carry_state=True` or
    `step_mode="s"`). A model that takes its state as an argument always starts from the reset state.
    Gradients are None after the call.

    Raises:
        InputError: before the first update: SNNFX610 (input and target differ in length), SNNFX611 (the loss is not a
            scalar), SNNFX612 (the optimizer has parameters that are not in the model), SNNFX613 (`w_ra` does not match
            the optimizer), SNNFX309 (another argument is invalid).

    Source: Kag & Saligrama 2021, ICML; Yin et al. 2021, arXiv:2112.11231. The variant "reference" reproduces the
    results of SpikingJelly 2.0.0's function of the same name.
    """
    trainer = Trainer(model, FPTT(alpha, cast(Any, variant)), optimizer, f_loss_t, target_dim=0)
    check_averages(w_ra, trainer.updates.parameters)
    trainer.averages = w_ra
    _train(trainer, x_seq, target_seq)
    optimizer.zero_grad()


def ottt_online_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x_seq: Tensor,
    target_seq: Tensor,
    f_loss_t: Callable[[Any, Any], Tensor],
    online: bool,
) -> tuple[Tensor, Tensor]:
    """Train on one batch of sequences with OTTT.

    Every weight op of the model gets the eligibility trace of its own operand, except for weights on the network's
    input; the model needs no special modules. If the model is built from SpikingJelly's OTTT modules (`OTTTLIFNode`,
    `OTTTSequential`), which compute their own traces, or from `SLTTLIFNode`, which has none by design, no traces are
    added, and dropout draws a mask at every step, as in SpikingJelly.

    Args:
        model: a converted net, or any single-step model that `snnfx.convert` accepts.
        optimizer: over the parameters to train.
        x_seq: `[B, T, *]`.
        target_seq: `[B, T, *]`.
        f_loss_t: the loss of one step, `f_loss_t(y_t, target_t)`, a scalar; not divided by T. If a step returns a
            tuple, `y_t` is its first element.
        online: True: update at every step (OTTT-O); False: update once, after the sequence (OTTT-A).

    Returns:
        `(batch_loss, y_all)`: the sum of the losses of all steps, and the outputs `[B, T, *]`; both detached.

    State: as for `fptt_online_training`. Gradients are set to None before the gradients of an update are computed; the
    gradients of the last update remain.

    Raises:
        InputError: before the first update: SNNFX610 (input and target differ in length), SNNFX611 (the loss is not a
            scalar), SNNFX612 (the optimizer has parameters that are not in the model).

    Source: Xiao et al. 2022, arXiv:2210.04195. On models with SpikingJelly's OTTT modules, it reproduces the results of
    SpikingJelly 2.0.0's function of the same name.
    """
    for name, value in (("x_seq", x_seq), ("target_seq", target_seq)):
        if not isinstance(value, Tensor) or value.dim() < 2:
            shown = f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
            raise InputError("SNNFX610", f"{name} {shown}", hint="Pass a tensor [B, T, ...].")
    rule = _ottt_for(model)(update="step" if online else "end", loss_scale="sum")
    trainer = Trainer(model, rule, optimizer, f_loss_t, target_dim=0)
    base = trainer.nets((x_seq[:, 0],)).base
    if isinstance(_output_structure(base), tuple | list):
        trainer.loss = lambda y, target: f_loss_t(y[0], target)
    result = _train(trainer, x_seq.transpose(0, 1), target_seq.transpose(0, 1), return_outputs=True)
    outputs = result.outputs
    y_seq = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return result.loss, y_seq.movedim(output_time_dim(base), 0).transpose(0, 1).contiguous()


def _output_structure(net: Net) -> Any:
    """The pytree of the outputs of a step, without the carried state, with 0 for each tensor."""
    spec = net.program.output_spec
    zeros = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return outputs_without(zeros, [argument.path for argument in net.program.carried])


def _train(trainer: Trainer, x_seq: Any, target: Any, **options: Any) -> StepResult:
    """Run one training call from the current state of the model, and leave the final state in the model.

    Args:
        trainer: the trainer of the model.
        x_seq: positional arguments, with time in dim 0.
        target: with time in dim 0.
        **options: passed to `Trainer.step`.
    """
    model = trainer.model
    args = x_seq if isinstance(x_seq, tuple) else (x_seq,)
    nets = trainer.nets(example_of_one_step(args, {}))
    args = moved_to_time_dim(nets.base, args)
    if nets.base.program.carried:
        return trainer.step(args, target, **options)
    slots = [slot.name for slot in nets.base.program.slots]
    edited_slots = [slot.name for slot in nets.sequence.program.slots]
    result = trainer.step(args, target, state=read_model_state(model, slots, edited_slots), **options)
    write_model_state(model, slots, result.state)
    return result


def _ottt_for(model: nn.Module) -> Rule:
    """OTTT, without traces if the model consists of SpikingJelly's modules for OTTT or SLTT."""
    source = getattr(model, "source", model)
    kinds = {type(m).__name__ for m in source.modules() if type(m).__module__.startswith("spikingjelly.")}
    if kinds & {"OTTTLIFNode", "SLTTLIFNode"}:
        return OTTT_A(name="OTTT with SpikingJelly's modules", operand="raw", dropout="step")
    return OTTT_A
