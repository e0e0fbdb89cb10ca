"""Functions that an emitted graph calls between its regions: select, delay and expand states, repeat values over time.

Most of them return a sequence `[T, *]` of a value of the step graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.ops.memory_format import stack_in_layout, unbind_in_layout
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.leaf_modules import call_leaf

__all__ = [
    "call_module",
    "call_once",
    "carry_gradient",
    "delay_one_step",
    "expand_initial_value",
    "hold_over_time",
    "move_time",
    "multiply_by_time_steps",
    "reduce_over_time",
    "repeat_for_samples",
    "repeat_over_time",
    "select_state",
    "stack_steps",
    "start_value",
    "time_steps",
    "unbind_steps",
]


def select_state(
    state: dict[str, Any] | None, names: tuple[str, ...], persistent: tuple[str, ...] = ()
) -> tuple[Any, ...] | None:
    """Select the slots of one region from the state of the net; None: the reset state.

    Args:
        state: the state before the first step.
        names: the slots of the region.
        persistent: those that start from a buffer or parameter in the reset state (see `start_value`).
    """
    if state is None or not any(name in state for name in names if name not in persistent):
        return None
    missing = [name for name in names if name not in state]
    if missing:
        raise InputError(
            "SNNFX308",
            f"the state has no value for {', '.join(missing)}",
            why=f"its region also has {', '.join(name for name in names if name in state)}, which the state contains.",
            hint="Pass the whole state, or none.",
        )
    return tuple(state[name] for name in names)


def start_value(state: dict[str, Any] | None, name: str, current: Tensor) -> Any:
    """The value of a persistent slot before the first step: from the state, or the current value in the model."""
    return current.detach() if state is None or name not in state else state[name]


def carry_gradient(tensor: Tensor) -> Tensor:
    """A copy of a parameter that a call changes in place, so that the change leaves saved tensors of autograd valid."""
    return tensor.clone() if tensor.requires_grad else tensor


def call_module(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Call a module that is an argument of a region (torch.compile does not follow `operator.call`)."""
    return call_leaf(module, *args, **kwargs)


def call_once(region: Callable[..., Any], constants: tuple[Any, ...]) -> Any:
    """Run a region whose value does not change with time."""
    return region(*constants)


def time_steps(x_seq: Tensor) -> Tensor:
    """The indices of the time steps of a sequence `[T, *]`: a tensor `[T]`."""
    return torch.arange(x_seq.shape[0], device=x_seq.device)


def move_time(y_seq: Any, time_dim: int) -> Any:
    """Move time from dimension 0 of a sequence, or of each sequence of a structure, to another dimension."""
    if isinstance(y_seq, Tensor):
        return y_seq.movedim(0, time_dim)
    return pytree.tree_map_only(Tensor, lambda y: y.movedim(0, time_dim), y_seq)


def reduce_over_time(y_seq: Any, how: str) -> Any:
    """The mean, sum or last step of a sequence `[T, *]`, or of each sequence of a structure."""
    if not isinstance(y_seq, Tensor):
        if pytree.tree_is_leaf(y_seq):
            return y_seq
        return pytree.tree_map(lambda y: reduce_over_time(y, how), y_seq)
    if how == "last":
        return y_seq[-1]
    return y_seq.sum(0) if how == "sum" else y_seq.mean(0)


def multiply_by_time_steps(value: Any, time: Tensor) -> Any:
    """Multiply a value by the number of time steps T."""
    return value * time.shape[0]


def repeat_for_samples(value: Tensor, like: Tensor, batch_dim: int) -> Tensor:
    """Expand a value `[*]` shared by all samples to `[N, *]`, with N from another tensor (a view)."""
    return value.unsqueeze(0).expand(like.shape[batch_dim], *value.shape)


def repeat_over_time(value: Any, time: Tensor) -> Any:
    """Expand an invariant value `[*]` to a sequence `[T, *]` (a view)."""
    if not isinstance(value, Tensor):
        return value
    return value.unsqueeze(0).expand(time.shape[0], *value.shape)


def delay_one_step(
    following: Any,
    state: tuple[Any, ...] | None,
    initial: Any,
    time: Tensor,
    slot: str = "",
    has_batch: bool = False,
    unexpanded: int | None = 0,
) -> Tensor:
    """The sequence of a slot that only hands a value to the next step: `[initial, following[0], ..., [T-2]]`.

    Args:
        following: the next value at each step, `[T, *]`; a number where it is always the same.
        state: a tuple with the value before the first step; None: `initial`.
        initial: a number, or a tensor that can be expanded to `[*]`.
        time: `[T]`.
        slot, has_batch, unexpanded: as for `expand_initial_value`.

    Raises:
        InputError: SNNFX313, the state changes its shape.
    """
    first = initial if state is None else state[0]
    if first is None:
        first = 0  # only the shape of such a slot is read: it is on no cycle and has no initial value
    if not isinstance(following, Tensor):
        like = first if isinstance(first, Tensor) else stack_steps((first, following), time.device)[0]
        following = torch.full_like(like, following).expand(time.shape[0], *like.shape)
    first = expand_initial_value(first, following[0], slot, has_batch and state is None, unexpanded)
    return torch.cat((first.to(following.dtype).unsqueeze(0), following[:-1]))


def hold_over_time(state: tuple[Any, ...] | None, initial: Any, time: Tensor) -> Tensor:
    """Expand the initial value of a slot that is never written to a sequence `[T, *]` (a view).

    Args:
        state: a tuple with the value before the first step; None: `initial`.
        initial: a tensor `[*]`.
        time: `[T]`.
    """
    value: Tensor = initial if state is None else state[0]
    return value.unsqueeze(0).expand(time.shape[0], *value.shape)


def unbind_steps(x_seq: Any) -> Iterable[Any]:
    """The values of T steps of a sequence, or of a structure of sequences as `stack_steps` returns it."""
    if isinstance(x_seq, Tensor):
        return unbind_in_layout(x_seq)
    leaves, spec = pytree.tree_flatten(x_seq)
    steps = zip(*(unbind_in_layout(v) if isinstance(v, Tensor) else repeat(v) for v in leaves))  # noqa: B905
    return (pytree.tree_unflatten(values, spec) for values in steps)


def stack_steps(steps: Sequence[Any], device: torch.device, structures: bool = False) -> Any:
    """Stack the values of T steps to a sequence `[T, *]`; with `structures`, a structure to one of sequences.

    Early values may be numbers or smaller tensors, which are expanded to the shape of the last value. Numbers at all
    steps (a counter) give a tensor `[T]`. None stays None.
    """
    last = steps[-1]
    if all(isinstance(value, Tensor) and value.shape == last.shape for value in steps):
        return stack_in_layout(steps)
    if not all(pytree.tree_is_leaf(value) for value in steps):
        if not structures:
            raise InputError(
                "SNNFX313",
                f"a module that runs step by step returns a {_type_of_structure(steps)} at each step",
                why="the code that called it was traced without this value, so its checks of the type are unknown.",
                hint="Pass example_inputs, so that the module can be traced, or read the elements where it is called: "
                "y = self.part(x); return y[0], y[1].",
            )
        return _stack_structures(steps, device)
    if not isinstance(last, Tensor):
        if all(value is None for value in steps):
            return None
        if not isinstance(last, bool | int | float | complex):
            raise InputError(
                "SNNFX313",
                f"a module that runs step by step returns a {type(last).__name__} at each step",
                why="only tensors and numbers can be stacked over time.",
                hint="Return tensors or numbers from the module.",
            )
        # float64: a 0-dimensional value of a step does not change the dtype of its other operand.
        dtype = torch.float64 if any(isinstance(value, float) for value in steps) else None
        return torch.tensor(steps, dtype=dtype, device=device)
    shapes = dict.fromkeys(tuple(value.shape) for value in steps if isinstance(value, Tensor))
    if not all(_broadcasts(shape, tuple(last.shape)) for shape in shapes):
        raise InputError(
            "SNNFX313",
            f"a value has shape {list(next(iter(shapes)))} at the first step and {list(last.shape)} at the last",
            why="all steps of a sequence must have one shape.",
            hint="Keep the shape of states: self.h = torch.cat([self.h, x])[-k:], starting from k values.",
        )
    return torch.stack(
        [torch.as_tensor(value, dtype=last.dtype, device=last.device).expand_as(last) for value in steps]
    )


def _stack_structures(steps: Sequence[Any], device: torch.device) -> Any:
    flat = [pytree.tree_flatten(value) for value in steps]
    spec = flat[-1][1]
    for t, (_, other) in enumerate(flat):
        if other != spec:
            raise InputError(
                "SNNFX313",
                f"a module that runs step by step returns other values at step {t} than at step {len(steps) - 1}",
                why=f"their structures differ: {_types_in(steps[t])} and {_types_in(steps[-1])}.",
                hint="Return the same tuple, list or dict of tensors at each step.",
            )
    sequences = [stack_steps(values, device, True) for values in zip(*(leaves for leaves, _ in flat), strict=True)]
    return pytree.tree_unflatten(sequences, spec)


def _type_of_structure(steps: Sequence[Any]) -> str:
    return next(type(value).__name__ for value in steps if not pytree.tree_is_leaf(value))


def _types_in(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: type(leaf).__name__, value)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of a shape can be expanded to another shape."""
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, other) for size, other in sizes)


def _may_expand(shape: Sequence[int], to: Sequence[int], unexpanded: int | None) -> bool:
    if unexpanded is None or unexpanded == -1:
        return unexpanded == -1 and len(shape) == len(to) and shape[1:] == to[1:]
    return unexpanded == 0 or shape[-unexpanded:] == to[-unexpanded:]


def expand_initial_value(
    value: Any, following: Any, slot: str = "", has_batch: bool = False, unexpanded: int | None = 0
) -> Any:
    """Expand the initial value of a slot, a number or a smaller tensor, to the shape of its next value.

    Args:
        value: a number or a tensor.
        following: the value after a step.
        slot: name of the slot, for the message.
        has_batch: the initial value has its batch in dim 0, so it must not be expanded to more dimensions.
        unexpanded: the number of last dimensions that must not be expanded, because readers of the state depend on
            them; -1: all but dimension 0, None: all.

    Raises:
        InputError: SNNFX313, the state changes its shape.
    """
    if not isinstance(following, Tensor):
        return value
    if not isinstance(value, Tensor):
        return torch.full_like(following, value)
    if not _broadcasts(value.shape, following.shape) or (has_batch and 0 < value.dim() < following.dim()):
        raise InputError(
            "SNNFX313",
            f"the state `{slot}` changes its shape: {list(value.shape)} before the first step, "
            f"{list(following.shape)} after it",
            why="all steps of a sequence must have one shape.",
            hint="Create the state in its final shape, e.g. with torch.zeros_like of the value assigned to it.",
        )
    if value.shape == following.shape:
        return value
    if not _may_expand(value.shape, following.shape, unexpanded):
        raise InputError(
            "SNNFX313",
            f"the state `{slot}` changes its shape: {list(value.shape)} before the first step, "
            f"{list(following.shape)} after it",
            why="the step computes something from it that depends on its shape, such as a sum.",
            hint="Create the state in its final shape, e.g. with torch.zeros_like of the value assigned to it.",
        )
    return value.expand_as(following)
