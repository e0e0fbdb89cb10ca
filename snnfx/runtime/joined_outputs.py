"""Join the outputs of the chunks of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["JoinedOutputs", "JoinedReductions", "combine_reductions"]


class JoinedOutputs:
    """Joins the outputs of the chunks of T time steps.

    Each chunk is written into one tensor allocated for all T steps, so that no second copy is needed. Outputs whose
    shape or dtype changes between chunks are concatenated at the end.
    """

    def __init__(self, T: int) -> None:
        self.T, self.steps = T, 0
        self._joined: list[Any] | None = None
        self._parts: list[tuple[Any, ...]] = []

    def add(self, outputs: tuple[Any, ...], steps: int) -> None:
        """Add the outputs of the next time steps: tensors `[steps, *]`, or values that are not tensors."""
        stop, tensors = self.steps + steps, [y for y in outputs if isinstance(y, Tensor)]
        if self._joined is None and not self._parts and all(y.dim() and y.shape[0] == stop for y in tensors):
            self._joined = [y.new_empty((self.T, *y.shape[1:])) if isinstance(y, Tensor) else y for y in outputs]
        if self._joined is not None and not all(map(_fits, self._joined, outputs)):
            self._parts = [tuple(y[: self.steps] if isinstance(y, Tensor) else y for y in self._joined)]
            self._joined = None
        if self._joined is None:
            self._parts.append(outputs)
        else:
            for index, y in enumerate(outputs):
                if isinstance(y, Tensor):
                    self._joined[index][self.steps : stop] = y
                else:
                    self._joined[index] = y
        self.steps = stop

    def values(self) -> tuple[Any, ...]:
        """The joined outputs of all time steps."""
        if self._joined is not None:
            return tuple(self._joined)
        columns = zip(*self._parts, strict=True)
        return tuple(torch.cat(column) if isinstance(column[0], Tensor) else column[-1] for column in columns)


def _fits(joined: Any, y: Any) -> bool:
    if not isinstance(joined, Tensor) or not isinstance(y, Tensor):
        return not isinstance(joined, Tensor) and not isinstance(y, Tensor)
    return joined.shape[1:] == y.shape[1:] and joined.dtype == y.dtype


class JoinedReductions:
    """Combines the reductions over the chunks of a sequence into the reduction over all time steps."""

    def __init__(self, reduce: str) -> None:
        self.reduce = reduce
        self._parts: list[tuple[int, tuple[Any, ...]]] = []

    def add(self, outputs: tuple[Any, ...], steps: int) -> None:
        """Add the reduction over the next time steps."""
        self._parts.append((steps, outputs))

    def values(self) -> tuple[Any, ...]:
        """The reduction over all time steps."""
        return combine_reductions(self._parts, self.reduce)


def combine_reductions(parts: Sequence[tuple[int, tuple[Any, ...]]], reduce: str) -> tuple[Any, ...]:
    """The reduction over all time steps, from the reductions over chunks.

    Args:
        parts: `(number of time steps, reduced outputs)` of each chunk.
        reduce: "mean", "sum" or "last".
    """
    T = sum(steps for steps, _ in parts)
    combined: list[Any] = []
    for values in zip(*(outputs for _, outputs in parts), strict=True):
        if reduce == "last" or not isinstance(values[-1], Tensor):
            combined.append(values[-1])
        else:
            weights = [steps / T if reduce == "mean" else 1.0 for steps, _ in parts]
            combined.append(sum(w * y for w, y in zip(weights, values, strict=True)))
    return tuple(combined)
