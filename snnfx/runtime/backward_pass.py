"""Refuse calls that change state beyond the call while a backward pass runs."""

from __future__ import annotations

from collections.abc import Collection

import torch

from snnfx.errors import InputError
from snnfx.sandbox.torch_internals import are_transforms_active, current_backward_pass

__all__ = ["is_in_backward_pass", "refuse_to_carry_state_in_backward", "refuse_to_update_slots"]


def is_in_backward_pass() -> bool:
    """Whether this thread runs a backward pass now."""
    return current_backward_pass() != -1


def refuse_to_carry_state_in_backward(slots: Collection[str]) -> None:
    """Refuse to carry the state of these slots, if any, before a call has changed anything.

    `torch.utils.checkpoint` runs its function a second time in the backward pass. The net has the state after the first
    run by then, so the second run would compute other values and other gradients, and advance the state once more.

    Raises:
        InputError: SNNFX320.
    """
    if slots:
        raise InputError(
            "SNNFX320",
            f"a net that carries its state ({', '.join(sorted(slots))}) was called during a backward pass",
            why="torch.utils.checkpoint runs its function a second time in the backward pass, but the net already has "
            "the state after the first run. The carried state is unchanged.",
            hint="Convert with checkpoint=..., or pass the state explicitly: "
            "y_seq, state = checkpoint(net.run, x_seq, state=state, use_reentrant=False).",
        )


def refuse_to_update_slots(slots: Collection[str]) -> None:
    """Refuse a call that would update persistent slots, if any, once more, or inside a transform of torch.func.

    Raises:
        InputError: SNNFX320 in a backward pass, SNNFX321 in a transform.
    """
    if not slots or torch.compiler.is_compiling():
        return
    if are_transforms_active():
        raise InputError(
            "SNNFX321",
            f"a net that updates {_listed(slots)} was called inside a transform of torch.func",
            why="the new value would be a tensor of the transform.",
            hint="Compute gradients with torch.autograd, or call net.eval() if only training updates the tensor.",
        )
    if is_in_backward_pass():
        raise InputError(
            "SNNFX320",
            f"a net that updates {_listed(slots)} was called during a backward pass",
            why="torch.utils.checkpoint runs its function again in the backward pass, but the first run has updated "
            "these tensors already. They are unchanged by this call.",
            hint='Let the net recompute by itself: snnfx.convert(model, checkpoint="regions").',
        )


def _listed(slots: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(slots))
