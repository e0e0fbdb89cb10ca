"""Memory of the values of a loop, with the row that each iteration uses."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RingBuffer", "Rows"]


class RingBuffer:
    """The memory of a value.

    Args:
        tensor: `[R, *]`.
        rows: the row that each iteration uses, int64.
        base: the ring buffer of which this one is a view.
    """

    def __init__(self, tensor: Tensor, rows: Tensor, base: RingBuffer | None = None) -> None:
        self.tensor, self.rows = tensor, rows
        self.base: RingBuffer = base.base if base is not None else self
        self._steps: list[Tensor] | None = None

    def steps(self) -> list[Tensor]:
        """The value of each iteration, as views."""
        if self._steps is None:
            views = self.tensor.unbind(0)
            self._steps = [views[k] for k in self.rows.tolist()]
        return self._steps

    def viewed(self, tensor: Tensor) -> RingBuffer:
        """The same rows of another tensor `[R, *]`."""
        return RingBuffer(tensor, self.rows, self)


class Rows:
    """The rows that the iterations of a pass use.

    Args:
        T: the number of iterations.
        reverse: whether the iterations run from the last step to the first.

    Attributes:
        step: the time step.
        zero, one: the same row at each iteration.
        this, other: two rows that alternate.
        first_then_one: row 0 at the first iteration, then row 1.
    """

    def __init__(self, T: int, reverse: bool) -> None:
        iterations = torch.arange(T, device="cpu")
        self.step = iterations.flip(0) if reverse else iterations
        self.zero, self.one = torch.zeros_like(iterations), torch.ones_like(iterations)
        self.this = iterations % 2
        self.other = 1 - self.this
        self.first_then_one = iterations.clamp(max=1)
