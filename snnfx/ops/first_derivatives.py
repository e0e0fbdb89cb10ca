"""Refuse second derivatives of functions that have a first derivative only."""

from __future__ import annotations

import torch

from snnfx.errors import InputError

__all__ = ["refuse_second_derivative"]


def refuse_second_derivative(what: str, hint: str) -> None:
    """Raise in a backward pass under create_graph=True.

    Raising later would be too late: nodes missing from the graph count as zero gradients, also under torch's
    `once_differentiable`, which checks only the incoming gradients.

    Args:
        what: the function, for the message.
        hint: how to proceed, for the message.

    Raises:
        InputError: SNNFX316.
    """
    if torch.is_grad_enabled():
        raise InputError(
            "SNNFX316",
            f"{what} has no second derivative",
            why="create_graph=True requests it, but only first derivatives are generated.",
            hint=hint,
        )
