"""Check the arguments of online training before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.online.learning_rules import Rule

__all__ = ["check_averages", "check_optimizer", "check_random_steps", "checked_step_count"]


def checked_step_count(name: str, value: Any, least: int = 1) -> int:
    """Check that an argument is a number of time steps, and return it.

    Raises:
        InputError: SNNFX614 if it is not an int of at least `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        why = f"expected a number of time steps (an int of at least {least})."
        raise InputError("SNNFX614", f"invalid {name}={value!r}", why=why)
    return value


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Check that the optimizer updates parameters of the model only, and return them.

    Raises:
        InputError: SNNFX612 if it has another model's parameters or none to train; SNNFX309 if the model is not a
            module, or the optimizer is not an optimizer or evaluates the loss itself (LBFGS).
    """
    if not isinstance(model, nn.Module):
        raise InputError("SNNFX309", f"the model is a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        what = f"the optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer"
        raise InputError("SNNFX309", what, hint="Pass e.g. torch.optim.SGD(model.parameters(), lr=0.1).")
    if isinstance(optimizer, torch.optim.LBFGS):
        why = "it evaluates the loss several times per update, and an online rule evaluates it once."
        raise InputError("SNNFX309", "LBFGS cannot train online", why=why, hint="Use e.g. torch.optim.Adam.")
    own = {id(p) for p in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [list(p.shape) for p in parameters if id(p) not in own]
    if foreign:
        raise InputError(
            "SNNFX612",
            f"{len(foreign)} of the optimizer's {len(parameters)} parameters do not belong to the model",
            why=f"the first one has shape {foreign[0]}.",
            hint="Build the optimizer from model.parameters() (a converted net shares the parameters of its model).",
        )
    if not any(p.requires_grad for p in parameters):
        hint = "Call requires_grad_() on the parameters to train."
        raise InputError("SNNFX612", "none of the optimizer's parameters requires a gradient", hint=hint)
    return parameters


def check_averages(w_ra: Any, parameters: Sequence[Tensor]) -> None:
    """Check that FPTT's running averages match the optimizer's parameters.

    Raises:
        InputError: SNNFX613 if they differ in number, shape, dtype or device, or share memory with a parameter.
    """
    hint = "Create it with fptt_online_training_init_w_ra(optimizer), from the same optimizer."
    if not isinstance(w_ra, list):
        raise InputError("SNNFX613", f"w_ra is a {type(w_ra).__name__}, not a list", hint=hint)
    if len(w_ra) != len(parameters):
        what = f"w_ra has {len(w_ra)} entries, but the optimizer has {len(parameters)} parameters"
        raise InputError("SNNFX613", what, hint=hint)
    for index, (average, parameter) in enumerate(zip(w_ra, parameters, strict=True)):
        if not isinstance(average, Tensor) or average.shape != parameter.shape:
            shown = (
                f"has shape {list(average.shape)}" if isinstance(average, Tensor) else f"is {type(average).__name__}"
            )
            what = f"w_ra[{index}] {shown}, but the optimizer's parameter has shape {list(parameter.shape)}"
            raise InputError("SNNFX613", what, hint=hint)
        if (average.dtype, average.device) != (parameter.dtype, parameter.device):
            what = f"w_ra[{index}] is {average.dtype} on {average.device}"
            why = f"the optimizer's parameter is {parameter.dtype} on {parameter.device}."
            raise InputError("SNNFX613", what, why=why, hint=hint)
        if parameter.numel() and average.data_ptr() == parameter.data_ptr():
            why = "it would change with every update instead of averaging the updates."
            raise InputError("SNNFX613", f"w_ra[{index}] shares its memory with the parameter", why=why, hint=hint)


def check_random_steps(rule: Rule, T: int) -> None:
    """Check that a sequence has as many time steps as the rule samples.

    Raises:
        InputError: SNNFX614 if it has fewer.
    """
    if rule.random_steps is not None and rule.random_steps > T:
        raise InputError(
            "SNNFX614",
            f"the rule {rule.name} samples {rule.random_steps} time steps, but the sequence has only {T}",
            hint=f"Choose K between 1 and {T}.",
        )
