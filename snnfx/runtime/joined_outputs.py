"""Join the outputs of the chunks of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.errors import InputError
from snnfx.sandbox.torch_internals import pytree

__all__ = ["JoinedOutputs", "JoinedReductions", "combine_reductions", "join_two"]


class JoinedOutputs:
    """Joins the outputs of the chunks of T time steps.

    Each chunk is written into one tensor allocated for all T steps, so that no second copy is needed. Outputs whose
    shape or dtype changes between chunks are concatenated at the end.
    """

    def __init__(self, T: int) -> None:
        self.T, self.steps = T, 0
        self._joined: list[Any] | None = None
        self._parts: list[Sequence[Any]] = []
        self._structure: pytree.TreeSpec | None = None

    def add(self, outputs: tuple[Any, ...], steps: int) -> None:
        """Add the outputs of the next time steps: tensors `[steps, *]`, structures of these, or other values."""
        leaves, self._structure = flatten_alike(outputs, self._structure)
        stop, tensors = self.steps + steps, [y for y in leaves if isinstance(y, Tensor)]
        if self._joined is None and not self._parts and all(y.dim() and y.shape[0] == stop for y in tensors):
            self._joined = [y.new_empty((self.T, *y.shape[1:])) if isinstance(y, Tensor) else y for y in leaves]
        if self._joined is not None and not all(map(_fits, self._joined, leaves)):
            self._parts = [[y[: self.steps] if isinstance(y, Tensor) else y for y in self._joined]]
            self._joined = None
        if self._joined is None:
            self._parts.append(leaves)
        else:
            for index, y in enumerate(leaves):
                if isinstance(y, Tensor):
                    self._joined[index][self.steps : stop] = y
                else:
                    self._joined[index] = y
        self.steps = stop

    def values(self) -> tuple[Any, ...]:
        """The joined outputs of all time steps."""
        if self._structure is None:
            return ()
        joined = self._joined
        if joined is None:
            columns = zip(*self._parts, strict=True)
            joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[-1] for column in columns]
        return pytree.tree_unflatten(joined, self._structure)  # type: ignore[no-any-return]


def flatten_alike(outputs: Any, structure: pytree.TreeSpec | None) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten the outputs of some time steps, which must have the structure of the steps before.

    Raises:
        InputError: SNNFX313, the structures differ.
    """
    leaves, found = pytree.tree_flatten(outputs)
    if structure is not None and found != structure:
        raise InputError(
            "SNNFX313",
            "a module that runs step by step returns other values in one chunk than in the next",
            why=f"their structures differ: {structure} and {found}.",
            hint="Return the same tuple, list or dict of tensors at each step.",
        )
    return leaves, found


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


def join_two(first: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """Join the outputs of one time step, without a time dimension, and those of the following steps."""
    if len(first) == len(rest) and all(isinstance(y, Tensor) for y in (*first, *rest)):
        return tuple([torch.cat((a.unsqueeze(0), b)) for a, b in zip(first, rest, strict=True)])
    ahead, structure = pytree.tree_flatten(first)
    after, _ = flatten_alike(rest, structure)
    pairs = zip(ahead, after, strict=True)
    joined = [torch.cat((a.unsqueeze(0), b)) if isinstance(a, Tensor) else a for a, b in pairs]
    return pytree.tree_unflatten(joined, structure)  # type: ignore[no-any-return]


def combine_reductions(parts: Sequence[tuple[int, tuple[Any, ...]]], reduce: str) -> tuple[Any, ...]:
    """The reduction over all time steps, from the reductions over chunks.

    Args:
        parts: `(number of time steps, reduced outputs)` of each chunk.
        reduce: "mean", "sum" or "last".
    """
    T = sum(steps for steps, _ in parts)
    combined: list[Any] = []
    flat: list[list[Any]] = []
    structure: pytree.TreeSpec | None = None
    for _, outputs in parts:
        leaves, structure = flatten_alike(outputs, structure)
        flat.append(leaves)
    if structure is None:
        return ()
    for values in zip(*flat, strict=True):
        if reduce == "last" or not isinstance(values[-1], Tensor):
            combined.append(values[-1])
        else:
            weights = [steps / T if reduce == "mean" else 1.0 for steps, _ in parts]
            combined.append(sum(w * y for w, y in zip(weights, values, strict=True)))
    return pytree.tree_unflatten(combined, structure)  # type: ignore[no-any-return]
