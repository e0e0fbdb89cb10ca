"""What can be wrong with a call of online training, found before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.online.learning_rules import Rule

__all__ = ["check_averages", "check_optimizer", "check_steps", "number_of_steps"]


def number_of_steps(name: str, value: Any, least: int = 1) -> int:
    """A number of time steps.

    Raises:
        InputError: SNNFX614, it is not an int of at least `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError("SNNFX614", f"{name}={value!r}", why=f"it is a number of time steps, at least {least}.")
    return value


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of the optimizer, all of which are the model's.

    Raises:
        InputError: SNNFX612, one is not; SNNFX309, there is no model, no optimizer, or one that calls the loss itself.
    """
    if not isinstance(model, nn.Module):
        raise InputError("SNNFX309", f"the model is a {type(model).__name__}, not a module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        hint = "Make one, e.g. torch.optim.SGD(model.parameters(), lr=0.1)."
        raise InputError("SNNFX309", f"the optimizer is a {type(optimizer).__name__}", hint=hint)
    if isinstance(optimizer, torch.optim.LBFGS):
        why = "it computes the loss several times for one update, which an online rule cannot."
        raise InputError("SNNFX309", "the optimizer is LBFGS", why=why, hint="Choose e.g. torch.optim.Adam.")
    own = {id(p) for p in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [list(p.shape) for p in parameters if id(p) not in own]
    if foreign:
        raise InputError(
            "SNNFX612",
            f"{len(foreign)} of the {len(parameters)} parameters of the optimizer are not the model's",
            why=f"the first of them has shape {foreign[0]}.",
            hint="Make the optimizer from model.parameters() (a converted net shares those of its model).",
        )
    if not any(p.requires_grad for p in parameters):
        raise InputError("SNNFX612", "the optimizer has no parameter that requires a gradient")
    return parameters


def check_averages(w_ra: Any, parameters: Sequence[Tensor]) -> None:
    """Whether running averages belong to the parameters of an optimizer.

    Raises:
        InputError: SNNFX613, they do not.
    """
    hint = "Make it with fptt_online_training_init_w_ra(optimizer) of the same optimizer."
    if not isinstance(w_ra, list):
        raise InputError("SNNFX613", f"w_ra is a {type(w_ra).__name__}, not a list", hint=hint)
    if len(w_ra) != len(parameters):
        what = f"w_ra has {len(w_ra)} entries for {len(parameters)} parameters of the optimizer"
        raise InputError("SNNFX613", what, hint=hint)
    for index, (average, parameter) in enumerate(zip(w_ra, parameters, strict=True)):
        if not isinstance(average, Tensor) or average.shape != parameter.shape:
            shown = list(average.shape) if isinstance(average, Tensor) else type(average).__name__
            what = f"w_ra[{index}] is {shown}, the parameter of the optimizer has shape {list(parameter.shape)}"
            raise InputError("SNNFX613", what, hint=hint)
        if (average.dtype, average.device) != (parameter.dtype, parameter.device):
            what = f"w_ra[{index}] is {average.dtype} on {average.device}"
            why = f"the parameter of the optimizer is {parameter.dtype} on {parameter.device}."
            raise InputError("SNNFX613", what, why=why, hint=hint)
        if parameter.numel() and average.data_ptr() == parameter.data_ptr():
            why = "it would change with every update, and there would be nothing to average."
            raise InputError("SNNFX613", f"w_ra[{index}] is the parameter itself", why=why, hint=hint)


def check_steps(rule: Rule, T: int) -> None:
    """Whether the numbers of steps of a rule fit a sequence.

    Raises:
        InputError: SNNFX614, more random steps than there are.
    """
    if rule.random_steps is not None and rule.random_steps > T:
        raise InputError(
            "SNNFX614",
            f"cannot take gradients at {rule.random_steps} random steps of a sequence of {T}",
            hint="Choose K at most T.",
        )
