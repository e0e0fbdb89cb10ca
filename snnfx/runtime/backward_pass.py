"""Refuse calls that carry state across calls while a backward pass runs."""

from __future__ import annotations

from snnfx.errors import InputError
from snnfx.sandbox.torch_internals import current_backward_pass

__all__ = ["refuse_to_carry_state_in_backward"]


def refuse_to_carry_state_in_backward() -> None:
    """Refuse to carry state during a backward pass, before anything is changed.

    `torch.utils.checkpoint` runs its function a second time in the backward pass. The net has the state after the first
    run by then, so the second run would compute other values and other gradients, and advance the state once more.

    Raises:
        InputError: SNNFX325.
    """
    if current_backward_pass() != -1:
        raise InputError(
            "SNNFX325",
            "a net that carries its state was called during a backward pass",
            why="torch.utils.checkpoint runs its function again in the backward pass, but the net already has the state "
            "after the first run. The carried state is unchanged.",
            hint="Checkpoint with snnfx.convert(model, checkpoint=..., carry_state=True), or pass the state explicitly: "
            "y_seq, state = checkpoint(net.run, x_seq, state=state, use_reentrant=False).",
        )
