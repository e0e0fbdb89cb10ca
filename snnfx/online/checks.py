"""What can be wrong with a call of online training, found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from snnfx.errors import InputError
from snnfx.online.rules import Rule

__all__ = ["check_averages", "check_optimizer", "check_steps", "number_of_steps", "target_with_time_first"]


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
        InputError: SNNFX612, one is not.
    """
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


def target_with_time_first(target: Any, time_dim: int | None, T: int, leaves: Iterable[Tensor]) -> Any:
    """The target with T in front (or without T, for `time_dim=None`), after looking at its lengths.

    Raises:
        InputError: SNNFX610, the number of steps or the batch is not that of the input.
    """

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or time_dim is None:
            return value
        if value.dim() == 0 or not -value.dim() <= time_dim < value.dim():
            why = f"its shape is {list(value.shape)}, and its time is dimension {time_dim}."
            hint = "For one target for all steps pass target_dim=None."
            raise InputError("SNNFX610", "the target has no time dimension", why=why, hint=hint)
        return value if time_dim == 0 else value.movedim(time_dim, 0)

    first = pytree.tree_map(moved, target)
    batches = {x.shape[1] for x in leaves if x.dim() > 2}
    for value in pytree.tree_leaves(first):
        if not isinstance(value, Tensor):
            continue
        if time_dim is not None and value.shape[0] != T:
            raise InputError(
                "SNNFX610",
                f"the target has {value.shape[0]} time steps, the input has {T}",
                hint="Both have T in the same place; for one target for all steps pass target_dim=None.",
            )
        step = value.shape[0 if time_dim is None else 1 :]
        if len(batches) == 1 and len(step) > 0 and step[0] not in batches:
            raise InputError(
                "SNNFX610",
                f"the target has a batch of {step[0]}, the input of {next(iter(batches))}",
                why=f"one step of the target has shape {list(step)}.",
            )
    return first
