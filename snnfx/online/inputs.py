"""Prepare the inputs and targets of a training call: detach them, move time to dim 0, check their lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.errors import InputError
from snnfx.ir.facts import VALUE
from snnfx.ir.options import time_dims_of_leaves
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "args_and_kwargs",
    "batch_size_of",
    "detached_inputs",
    "example_of_one_step",
    "moved_to_time_dim",
    "output_time_dim",
    "target_length",
    "time_first_target",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def args_and_kwargs(x_seq: Any) -> Arguments:
    """Convert a tensor, a tuple of positional arguments or a dict of keyword arguments to `(args, kwargs)`."""
    if isinstance(x_seq, dict):
        return (), x_seq
    return (x_seq if isinstance(x_seq, tuple) else (x_seq,)), {}


def detached_inputs(tree: Any) -> Any:
    """Detach all tensors, so that no gradient flows into the inputs of a call."""
    # Autograd cannot save an inference tensor for backward; a clone made outside inference mode is a normal tensor.
    return pytree.tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x.detach(), tree)


def example_of_one_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Extract the arguments of the first time step, as `snnfx.convert` takes them for `example_inputs`.

    Raises:
        InputError: SNNFX306 if an argument is neither a tensor with time in dim 0 nor a constant.
    """
    for x in pytree.tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[0] == 0):
            what = f"an input of shape {list(x.shape)} has no time steps"
        elif not isinstance(x, Tensor | bool | int | float | str | None):
            what = f"an input is a {type(x).__name__}, not a tensor"
        else:
            continue
        raise InputError("SNNFX306", what, hint="Pass each sequence as a tensor [T, N, ...].")
    step = pytree.tree_map_only(Tensor, lambda x: x[0], (args, kwargs))
    return step[1] or step[0]


def moved_to_time_dim(net: Net, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Move time from dim 0 of each positional argument to the `time_dim` of the net."""
    leaves, spec = pytree.tree_flatten((args, {}))
    dims = time_dims_of_leaves(net.options.time_dim, net.program)
    if len(leaves) != len(dims):
        return args  # the net raises an error that lists its inputs
    moved = [x.movedim(0, dim) if isinstance(x, Tensor) and dim else x for x, dim in zip(leaves, dims, strict=True)]
    return pytree.tree_unflatten(moved, spec)[0]  # type: ignore[no-any-return]


def output_time_dim(net: Net) -> int:
    """The time dimension of the outputs of a net."""
    return net.options.time_dim if isinstance(net.options.time_dim, int) else 0


def batch_size_of(net: Net, leaves: Iterable[Tensor]) -> int | None:
    """The batch size, or None if the first dimension of a step may be something else.

    Args:
        net: the net that takes the inputs.
        leaves: the input tensors, with time in dim 0.
    """
    program = net.program
    pairs = zip(leaves, net.varying_inputs, program.input_nodes(), strict=True)
    sizes = {x.shape[1 if varies else 0] for x, varies, _ in pairs if x.dim() > (2 if varies else 1)}
    examples = {_first_size(node) for node in program.input_nodes() if node.name in program.batched_inputs}
    # If dim 0 is the batch, the inputs and outputs of the example agree on its size.
    results = {_first_size(value) for value in program.outputs if isinstance(value, Node)}
    return sizes.pop() if len(sizes) == 1 and len((examples | results) - {None}) <= 1 else None


def _first_size(node: Node) -> int | None:
    value = VALUE.of(node)
    return (value.shape[0] if value.dim() else 0) if isinstance(value, Tensor) else None


def target_length(target: Any, time_dim: int | None) -> int | None:
    """The number of time steps of a target, or None if it has no time dimension."""
    if time_dim is None:
        return None
    lengths = [
        x.shape[time_dim]
        for x in pytree.tree_leaves(target)
        if isinstance(x, Tensor) and -x.dim() <= time_dim < x.dim()
    ]
    return lengths[0] if lengths else None


def time_first_target(target: Any, time_dim: int | None, T: int, batch: int | None) -> Any:
    """Move time to dim 0 of the target and check its lengths.

    Args:
        target: a tensor or a pytree of tensors.
        time_dim: its time dimension; None if it is the same at every step.
        T: number of time steps of the input.
        batch: batch size of the input; None if unknown.

    Raises:
        InputError: SNNFX610 if its number of steps or its batch size differs from the input, or if it contains an
            array that is not a tensor.
    """

    def time_first(value: Any) -> Any:
        if not isinstance(value, Tensor):
            if hasattr(value, "__array__"):
                hint = "Convert it with torch.as_tensor."
                raise InputError("SNNFX610", f"the target is a {type(value).__name__}, not a tensor", hint=hint)
            return value
        if time_dim is None:
            return value
        if value.dim() == 0 or not -value.dim() <= time_dim < value.dim():
            why = f"its shape is {list(value.shape)}, and time is expected in dim {time_dim}."
            hint = "If the target is the same at every time step, pass target_dim=None to the Trainer."
            raise InputError("SNNFX610", "the target has no time dimension", why=why, hint=hint)
        return value if time_dim == 0 else value.movedim(time_dim, 0)

    moved = pytree.tree_map(time_first, target)
    for value in pytree.tree_leaves(moved):
        if not isinstance(value, Tensor):
            continue
        if time_dim is not None and value.shape[0] != T:
            raise InputError(
                "SNNFX610",
                f"the target has {value.shape[0]} time steps, but the input has {T}",
                hint="Pass one target per time step; if the target is the same at every step, pass target_dim=None to "
                "the Trainer.",
            )
        step = value.shape[0 if time_dim is None else 1 :]
        if batch is not None and len(step) > 0 and step[0] != batch:
            raise InputError(
                "SNNFX610",
                f"the target has batch size {step[0]}, but the input has batch size {batch}",
                why=f"one time step of the target has shape {list(step)}.",
            )
    return moved
