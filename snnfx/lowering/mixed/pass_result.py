"""The results of a pass over the time steps, and where a run reads and writes its tensors."""

from __future__ import annotations

from torch import Tensor

__all__ = ["PassResult", "where_it_is"]


def where_it_is(tensor: Tensor) -> Tensor:
    """The tensor: the operations of a run that is not repeated use its own tensors."""
    return tensor


class PassResult:
    """The results of a pass.

    Args:
        stacks: the values at all steps, `[T, *]`, of `PassGoal.stacks`.
        sums: the sums over time of `PassGoal.sums`.
        finals: the loop-carried values after the last step, in the order of `PassGoal.carried`.
        is_unshared: whether no result shares memory with the run.
    """

    def __init__(
        self, stacks: dict[int, Tensor], sums: dict[int, Tensor], finals: list[Tensor], is_unshared: bool = False
    ) -> None:
        self.stacks, self.sums, self.finals, self.is_unshared = stacks, sums, finals, is_unshared

    def own_finals(self) -> list[Tensor]:
        """The final values in memory of their own."""
        return self.finals if self.is_unshared else [final.clone() for final in self.finals]
