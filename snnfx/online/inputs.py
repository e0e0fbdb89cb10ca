"""What a call of online training is given, as the rules take it: time in front, no history, lengths that fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.errors import InputError
from snnfx.ir.options import time_dims_of_leaves
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "batch_of_steps",
    "call_arguments",
    "first_step",
    "output_time_dim",
    "steps_of_target",
    "target_with_time_first",
    "time_where_it_belongs",
    "without_history",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def call_arguments(x_seq: Any) -> Call:
    """A tensor, a tuple of positional or a dict of keyword arguments as `(args, kwargs)`."""
    if isinstance(x_seq, dict):
        return (), x_seq
    return (x_seq if isinstance(x_seq, tuple) else (x_seq,)), {}


def without_history(tree: Any) -> Any:
    """The same values without their history: no gradient goes to what a call is given."""
    # A tensor made in inference mode cannot be saved for a backward pass.
    return pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x.detach(), tree)


def first_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of the first step as `snnfx.convert` takes them, to capture a model with their shapes.

    Raises:
        InputError: SNNFX306, there is something else than tensors with time in front, and constants.
    """
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[0] == 0):
            what = f"an input has shape {list(x.shape)}"
        elif not isinstance(x, Tensor | bool | int | float | str | None):
            what = f"an input is a {type(x).__name__}"
        else:
            continue
        raise InputError("SNNFX306", what, hint="A sequence is a tensor [T, N, ...].")
    step = pytree.tree_map_only(Tensor, lambda x: x[0], (args, kwargs))
    return step[1] or step[0]


def time_where_it_belongs(net: Net, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Positional arguments that have time in front, with time where a net has it."""
    leaves, spec = pytree.tree_flatten((args, {}))
    dims = time_dims_of_leaves(net.options.time_dim, net.program)
    if len(leaves) != len(dims):
        return args  # the net tells what it takes
    moved = [x.movedim(0, dim) if isinstance(x, Tensor) and dim else x for x, dim in zip(leaves, dims, strict=True)]
    return pytree.tree_unflatten(moved, spec)[0]  # type: ignore[no-any-return]


def output_time_dim(net: Net) -> int:
    """Where time is in the outputs of a net."""
    return net.options.time_dim if isinstance(net.options.time_dim, int) else 0


def batch_of_steps(net: Net, leaves: Iterable[Tensor]) -> int | None:
    """The size of the batch, None where the first dimension of a step may be something else.

    Args:
        net: takes the inputs.
        leaves: the tensors of the inputs, time first.
    """
    program = net.program
    pairs = zip(leaves, net.varying_inputs, program.input_nodes(), strict=True)
    sizes = {x.shape[1 if varies else 0] for x, varies, _ in pairs if x.dim() > (2 if varies else 1)}
    examples = {_first_size(node) for node in program.input_nodes() if node.name in program.batched_inputs}
    # In the example, the first dimension of inputs and outputs was of one size, if it is the batch.
    results = {_first_size(value) for value in program.outputs if isinstance(value, Node)}
    return sizes.pop() if len(sizes) == 1 and len((examples | results) - {None}) <= 1 else None


def _first_size(node: Node) -> int | None:
    value = node.meta.get("val")
    return (value.shape[0] if value.dim() else 0) if isinstance(value, Tensor) else None


def steps_of_target(target: Any, time_dim: int | None) -> int | None:
    """How many time steps a target has; None: it has none, or no time."""
    if time_dim is None:
        return None
    lengths = [
        x.shape[time_dim]
        for x in pytree.tree_leaves(target)
        if isinstance(x, Tensor) and -x.dim() <= time_dim < x.dim()
    ]
    return lengths[0] if lengths else None


def target_with_time_first(target: Any, time_dim: int | None, T: int, batch: int | None) -> Any:
    """The target with T in front (or without T, for `time_dim=None`), after looking at its lengths.

    Raises:
        InputError: SNNFX610, the number of steps or the batch is not that of the input, or it holds an array that is no
            tensor.
    """

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            if hasattr(value, "__array__"):
                hint = "Make it a tensor with torch.as_tensor."
                raise InputError("SNNFX610", f"the target is a {type(value).__name__}, not a tensor", hint=hint)
            return value
        if time_dim is None:
            return value
        if value.dim() == 0 or not -value.dim() <= time_dim < value.dim():
            why = f"its shape is {list(value.shape)}, and its time is dimension {time_dim}."
            hint = "For one target for all steps pass target_dim=None."
            raise InputError("SNNFX610", "the target has no time dimension", why=why, hint=hint)
        return value if time_dim == 0 else value.movedim(time_dim, 0)

    first = pytree.tree_map(moved, target)
    for value in pytree.tree_leaves(first):
        if not isinstance(value, Tensor):
            continue
        if time_dim is not None and value.shape[0] != T:
            raise InputError(
                "SNNFX610",
                f"the target has {value.shape[0]} time steps, the input has {T}",
                hint="Both have T in the same place; for one target for all steps pass target_dim=None.",
            )
        step = value.shape[0 if time_dim is None else 1 :]
        if batch is not None and len(step) > 0 and step[0] != batch:
            raise InputError(
                "SNNFX610",
                f"the target has a batch of {step[0]}, the input of {batch}",
                why=f"one step of the target has shape {list(step)}.",
            )
    return first
