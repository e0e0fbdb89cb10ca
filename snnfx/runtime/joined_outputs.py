"""The outputs of a sequence that was run piece by piece, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["JoinedOutputs", "JoinedReductions", "combine_reductions"]


class JoinedOutputs:
    """The outputs of chunks of a sequence of T steps, written into one tensor each, so that there are never two copies.

    Outputs whose shape or dtype changes from chunk to chunk are concatenated in the end.
    """

    def __init__(self, T: int) -> None:
        self.T, self.steps = T, 0
        self.wholes: list[Any] | None = None
        self.parts: list[tuple[Any, ...]] = []

    def add(self, outputs: tuple[Any, ...], steps: int) -> None:
        """The outputs of the next few steps, `[steps, *]` each, or values that are no tensors."""
        stop, tensors = self.steps + steps, [y for y in outputs if isinstance(y, Tensor)]
        if self.wholes is None and not self.parts and all(y.dim() and y.shape[0] == stop for y in tensors):
            self.wholes = [y.new_empty((self.T, *y.shape[1:])) if isinstance(y, Tensor) else y for y in outputs]
        if self.wholes is not None and not all(map(_fits, self.wholes, outputs)):
            self.parts = [tuple(y[: self.steps] if isinstance(y, Tensor) else y for y in self.wholes)]
            self.wholes = None
        if self.wholes is None:
            self.parts.append(outputs)
        else:
            for index, y in enumerate(outputs):
                if isinstance(y, Tensor):
                    self.wholes[index][self.steps : stop] = y
                else:
                    self.wholes[index] = y
        self.steps = stop

    def values(self) -> tuple[Any, ...]:
        """All steps of each output."""
        if self.wholes is not None:
            return tuple(self.wholes)
        columns = zip(*self.parts, strict=True)
        return tuple(torch.cat(column) if isinstance(column[0], Tensor) else column[-1] for column in columns)


def _fits(whole: Any, y: Any) -> bool:
    if not isinstance(whole, Tensor) or not isinstance(y, Tensor):
        return not isinstance(whole, Tensor) and not isinstance(y, Tensor)
    return whole.shape[1:] == y.shape[1:] and whole.dtype == y.dtype


class JoinedReductions:
    """The reduction over all steps of a sequence, from those of its chunks."""

    def __init__(self, reduce: str) -> None:
        self.reduce = reduce
        self.parts: list[tuple[int, tuple[Any, ...]]] = []

    def add(self, outputs: tuple[Any, ...], steps: int) -> None:
        """The reduction over the next few steps."""
        self.parts.append((steps, outputs))

    def values(self) -> tuple[Any, ...]:
        """The reduction over all of them."""
        return combine_reductions(self.parts, self.reduce)


def combine_reductions(parts: Sequence[tuple[int, tuple[Any, ...]]], reduce: str) -> tuple[Any, ...]:
    """The reduction over all steps from those over pieces, given as `(number of steps, outputs)`."""
    T = sum(steps for steps, _ in parts)
    combined: list[Any] = []
    for values in zip(*(outputs for _, outputs in parts), strict=True):
        if reduce == "last" or not isinstance(values[-1], Tensor):
            combined.append(values[-1])
        else:
            weights = [steps / T if reduce == "mean" else 1.0 for steps, _ in parts]
            combined.append(sum(w * y for w, y in zip(weights, values, strict=True)))
    return tuple(combined)
