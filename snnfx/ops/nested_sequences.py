"""Pytrees of sequences `[T, *]`: check them, split them into calls, join the results."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from snnfx.errors import InputError
from snnfx.sandbox.pytree_paths import flatten_with_path
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "check_sequences",
    "cut_into_calls",
    "flatten_nest",
    "join_over_time",
    "no_sequence",
    "positional_arguments",
    "shapes_of",
]


def check_sequences(x_seq: Any, time_dim: int) -> int:
    """The number of time steps T, which must be equal for all tensors in `x_seq`.

    Raises:
        InputError: SNNFX301, 303, 305 or 306, see `snnfx.functional.multi_step_forward`.
    """
    leaves, _ = flatten_nest(x_seq)
    others = [type(x).__name__ for x in leaves if not isinstance(x, Tensor)]
    if others or not leaves:
        raise InputError("SNNFX305", f"x_seq holds {', '.join(others) or 'nothing'} where a tensor is expected")
    if 0 in [x.dim() for x in leaves]:
        raise InputError("SNNFX306", "a tensor without dimensions has no time steps", why=f"{shapes_of(x_seq)}.")
    lengths: list[int] = [x.shape[time_dim] for x in leaves]
    T = lengths[0]
    if len(lengths) > 1 and any(length != T for length in lengths):
        why = f"{shapes_of(x_seq)}, and time is dimension {time_dim}."
        raise InputError("SNNFX303", "the sequences differ in their number of time steps", why=why)
    if T == 0:
        raise InputError("SNNFX301", "there are no time steps", why=f"{shapes_of(x_seq)}.")
    return T


def flatten_nest(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a pytree and a function that rebuilds it; fast for a tensor or a tuple of tensors."""
    if isinstance(tree, Tensor):
        return [tree], operator.itemgetter(0)
    if type(tree) is tuple and all(isinstance(leaf, Tensor) for leaf in tree):
        return list(tree), tuple
    leaves, spec = pytree.tree_flatten(tree)
    return leaves, partial(pytree.tree_unflatten, treespec=spec)


def positional_arguments(x: Any) -> tuple[Any, ...]:
    """The positional arguments of a step: the elements of a tuple or list, or one argument."""
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def cut_into_calls(x_seq: Any, cut: Callable[[Tensor], Sequence[Tensor]], count: int) -> Iterator[tuple[Any, ...]]:
    """The positional arguments of each of `count` calls, with every tensor split along time."""

    def slices(x: Any) -> Sequence[Any]:
        if isinstance(x, Tensor):
            return cut(x)
        leaves, spec = pytree.tree_flatten(x)
        columns = zip(range(count), *map(cut, leaves), strict=True)  # the range, as there may be no leaves
        return [pytree.tree_unflatten(leaves, spec) for _, *leaves in columns]

    return zip(*map(slices, positional_arguments(x_seq)), strict=True)


def join_over_time(parts: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Join the results of steps or chunks to one sequence for each leaf.

    Raises:
        InputError: SNNFX313, the results have different structures, or leaves other than tensors and None.
    """
    if all(isinstance(part, Tensor) for part in parts):
        return join(parts)
    leaves, specs = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise no_sequence("the time steps returned results of different nesting.")
    y_leaves: list[Tensor | None] = []
    for column in zip(*leaves, strict=True):
        if not (all(isinstance(y, Tensor) for y in column) or all(y is None for y in column)):
            raise no_sequence(f"the time steps returned {', '.join(sorted({type(y).__name__ for y in column}))}.")
        y_leaves.append(None if column[0] is None else join(list(column)))
    return pytree.tree_unflatten(y_leaves, specs[0])


def shapes_of(x_seq: Any) -> str:
    """The shape of each tensor, as a clause for messages."""
    paths = flatten_with_path(x_seq)[0]
    return ", ".join(f"x_seq{pytree.keystr(path)} is {list(x.shape)}" for path, x in paths)


def no_sequence(why: str, hint: str = "") -> InputError:
    """The error for outputs that cannot be joined over time."""
    return InputError("SNNFX313", "the outputs do not form a sequence", why=why, hint=hint)
