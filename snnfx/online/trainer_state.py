"""Checkpoints of a trainer: FPTT's running averages and multipliers, accumulation and gradient scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from snnfx.errors import InputError
from snnfx.online.updates import Updates

__all__ = ["load_trainer_state", "trainer_state"]

_KEYS = {"averages", "multipliers", "updates"}


def trainer_state(
    updates: Updates, averages: Sequence[Tensor] | None, multipliers: Mapping[int, Tensor]
) -> dict[str, Any]:
    """The state of a trainer, copied: an entry for each parameter of the optimizer, None if it has none yet."""
    known = dict(enumerate(averages or ()))
    return {
        "averages": _copies(updates.parameters, known),
        "multipliers": _copies(updates.parameters, multipliers),
        "updates": updates.state_dict(),
    }


def load_trainer_state(updates: Updates, state: Any) -> tuple[list[Tensor] | None, dict[int, Tensor]]:
    """Restore the state of the updates, and return the running averages and the multipliers.

    Raises:
        InputError: SNNFX622, before anything changes, if the state does not match the optimizer's parameters.
    """
    if not isinstance(state, Mapping) or set(state) != _KEYS:
        shown = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise _mismatch("this is not the state of a trainer", f"it has {shown} instead of {sorted(_KEYS)}.")
    parameters = updates.parameters
    entries = {name: state[name] for name in ("averages", "multipliers")}
    if pending := state["updates"]["gradients"]:
        entries["gradients"] = pending
    if state["updates"]["calls"] >= updates.accumulate:
        why = f"it has {state['updates']['calls']} accumulated calls; this trainer updates after {updates.accumulate}."
        raise _mismatch("the state does not match accumulate=", why)
    for name, values in entries.items():
        if len(values) != len(parameters):
            why = f"{name} has {len(values)} entries, and the optimizer has {len(parameters)} parameters."
            raise _mismatch("the state does not match the optimizer", why)
        for index, (value, parameter) in enumerate(zip(values, parameters, strict=True)):
            if value is not None and value.shape != parameter.shape:
                why = f"{name}[{index}] has shape {list(value.shape)}, and the parameter {list(parameter.shape)}."
                raise _mismatch("the state does not match the optimizer", why)
    updates.load_state_dict(state["updates"])
    averages, multipliers = (
        {i: v.to(p, copy=True) for i, (v, p) in enumerate(zip(state[name], parameters, strict=True)) if v is not None}
        for name in ("averages", "multipliers")
    )
    return list(averages.values()) or None, multipliers


def _copies(parameters: Sequence[Tensor], known: Mapping[int, Tensor]) -> list[Tensor | None]:
    return [known[i].clone() if i in known else None for i in range(len(parameters))]


def _mismatch(what: str, why: str) -> InputError:
    hint = "Load the state_dict() of a Trainer with the same parameters in the same order."
    return InputError("SNNFX622", what, why=why, hint=hint)
