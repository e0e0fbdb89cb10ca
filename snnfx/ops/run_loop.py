"""The call of a re-rolled loop in the graph of a model that runs over time itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["LoopHandle", "run_loop"]


class LoopHandle:
    """The net that runs the iterations of a loop; not a module, as the net shares the modules of the model.

    Args:
        net: the converted step of the loop.
        location: the user's file and line of the loop.
    """

    def __init__(self, net: nn.Module, location: str) -> None:
        self.net, self.location = net, location

    def __repr__(self) -> str:
        return f"loop at {self.location}"


def run_loop(
    loop: LoopHandle, steps: int, inputs: Sequence[Tensor], state: Mapping[str, Any]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Run all iterations of a loop.

    Args:
        loop: the loop.
        steps: the number of iterations.
        inputs: the inputs of its step: sequences, time first, and values that are the same in each iteration.
        state: values before the first iteration, by slot; None: the initial value.

    Returns:
        `(outputs over time, state after the last iteration)`.
    """
    return loop.net.run_iterations(steps, list(inputs), state)  # type: ignore[no-any-return, operator]
