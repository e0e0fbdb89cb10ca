"""Functions with a first derivative only."""

from __future__ import annotations

import torch

from snnfx.errors import InputError

__all__ = ["refuse_second_derivative"]


def refuse_second_derivative(what: str, hint: str) -> None:
    """Raise in a backward pass whose own gradient is wanted.

    That is said where create_graph=True asks for it: later, what is gone from the graph would count as a zero, also
    under torch's `once_differentiable`, which looks at the incoming gradients alone.

    Raises:
        InputError: SNNFX316.
    """
    if torch.is_grad_enabled():
        raise InputError(
            "SNNFX316",
            f"the gradient of {what} is to be differentiated",
            why="create_graph=True asks for the gradient of a gradient, which is not generated.",
            hint=hint,
        )
