"""Online training in one call: the functions that SpikingJelly documents, for any model that can be converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.online.call_checks import check_averages
from snnfx.online.inputs import first_step, output_time_dim, time_where_it_belongs
from snnfx.online.learning_rules import FPTT, OTTT_A, Rule
from snnfx.online.module_state import read_state, write_state
from snnfx.online.trainer import StepResult, Trainer
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import outputs_without

__all__ = ["fptt_online_training", "fptt_online_training_init_w_ra", "ottt_online_training"]


def fptt_online_training_init_w_ra(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The running averages that `fptt_online_training` starts from: a copy of every parameter of the optimizer.

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
    state and keeps nothing, unless it carries its state (`carry_state=True` or `step_mode="s"`); a model that takes its
    state as an argument always does.
    Gradients are None afterwards.

    Raises:
        InputError: before the first update: SNNFX610 (lengths differ), SNNFX611 (the loss is not a scalar), SNNFX612
            (the optimizer's parameters are not the model's), SNNFX613 (`w_ra` does not fit), SNNFX309.

    Source: Kag & Saligrama 2021, ICML; Yin et al. 2021, arXiv:2112.11231; SpikingJelly 2.0.0's function of that name,
    to whose numbers the variant "reference" is equal.
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

    Every weight op of the model gets the eligibility trace of its own operand, the network's input excepted; no special
    modules are needed. A model made of SpikingJelly's OTTT modules (`OTTTLIFNode`, `OTTTSequential`) has traces of its
    own, and one with `SLTTLIFNode` is meant to have none: those get no others, and their dropout draws as it does.

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
    for name, value in (("x_seq", x_seq), ("target_seq", target_seq)):
        if not isinstance(value, Tensor) or value.dim() < 2:
            shown = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError("SNNFX610", f"{name} is {shown}", hint="It is a tensor [B, T, ...].")
    rule = _ottt_for(model)(update="step" if online else "end", loss_scale="sum")
    trainer = Trainer(model, rule, optimizer, f_loss_t, target_dim=0)
    base = trainer.nets((x_seq[:, 0],)).base
    if isinstance(_outputs_of_step(base), tuple | list):
        trainer.loss = lambda y, target: f_loss_t(y[0], target)
    result = _train(trainer, x_seq.transpose(0, 1), target_seq.transpose(0, 1), return_outputs=True)
    outputs = result.outputs
    y_seq = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return result.loss, y_seq.movedim(output_time_dim(base), 0).transpose(0, 1).contiguous()


def _outputs_of_step(net: Net) -> Any:
    """What a step returns apart from its state, with something in the place of each tensor."""
    spec = net.program.output_spec
    places = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return outputs_without(places, [argument.path for argument in net.program.carried])


def _train(trainer: Trainer, x_seq: Any, target: Any, **options: Any) -> StepResult:
    """One call that goes on from the state of the model and leaves the final state there.

    Args:
        trainer: of the model.
        x_seq: positional arguments, time first.
        target: time first.
        **options: of `Trainer.step`.
    """
    model = trainer.model
    args = x_seq if isinstance(x_seq, tuple) else (x_seq,)
    nets = trainer.nets(first_step(args, {}))
    args = time_where_it_belongs(nets.base, args)
    if nets.base.program.carried:
        return trainer.step(args, target, **options)
    slots = [slot.name for slot in nets.base.program.slots]
    names = [slot.name for slot in nets.sequence.program.slots]
    result = trainer.step(args, target, state=read_state(model, slots, names), **options)
    write_state(model, slots, result.state)
    return result


def _ottt_for(model: nn.Module) -> Rule:
    """OTTT as the model means it: SpikingJelly's modules say which of the rules they are made for."""
    source = getattr(model, "source", model)
    kinds = {type(m).__name__ for m in source.modules() if type(m).__module__.startswith("spikingjelly.")}
    if kinds & {"OTTTLIFNode", "SLTTLIFNode"}:
        return OTTT_A(name="the rule of the model's modules", operand="raw", dropout="step")
    return OTTT_A
