"""Input sequences of a net, with the time dimension of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from snnfx.errors import InputError
from snnfx.sandbox.pytree_paths import flatten_with_path
from snnfx.sandbox.torch_internals import broadcast_prefix, pytree

__all__ = ["SequenceInputs"]


@dataclass(frozen=True)
class SequenceInputs:
    """The flattened arguments of a net, with the time dimension of each leaf (None: the same at every step)."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    dims: list[int | None]
    names: list[str]
    steps: int
    T: int | None
    output_dim: int

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], time_dim: Any, T: int | None) -> SequenceInputs:
        dims = _dims_of_leaves(time_dim, args, kwargs)
        with_paths, spec = flatten_with_path((args, kwargs))
        # Drop the first key of a path, which is the index in (args, kwargs).
        names = ["input" + pytree.keystr(path[1:]) for path, _ in with_paths]
        leaves = [leaf for _, leaf in with_paths]
        dims = [dim if isinstance(leaf, Tensor) else None for leaf, dim in zip(leaves, dims, strict=True)]
        lengths = {}
        for name, leaf, dim in zip(names, leaves, dims, strict=True):
            if dim is not None:
                if not -leaf.ndim <= dim < leaf.ndim:
                    raise InputError(
                        "SNNFX306",
                        f"`{name}` does not have the time dimension {dim}",
                        why=f"it has {leaf.ndim} dimensions.",
                        hint="Pass a sequence, or convert the model with the time_dim of this input.",
                    )
                lengths[name] = leaf.shape[dim]
        if not lengths and T is None:
            raise InputError(
                "SNNFX310",
                "the number of time steps is unknown",
                why="none of the inputs has a time dimension.",
                hint="Pass it: verify(..., T=8).",
            )
        steps = T if T is not None else next(iter(lengths.values()))
        if any(length != steps for length in lengths.values()):
            counts = ", ".join(f"`{name}` has {length}" for name, length in lengths.items())
            raise InputError(
                "SNNFX303",
                f"the inputs do not all have T = {steps} time steps",
                why=f"{counts}.",
                hint="Pass sequences of the same length.",
            )
        if steps < 1:
            raise InputError("SNNFX301", "the inputs have no time steps", hint="Pass at least one time step.")
        return SequenceInputs(leaves, spec, dims, names, steps, T, time_dim if isinstance(time_dim, int) else 0)

    def with_leaves(self, function: Callable[[Tensor], Tensor]) -> SequenceInputs:
        """The same arguments with a function applied to each tensor."""
        return replace(self, leaves=[function(x) if isinstance(x, Tensor) else x for x in self.leaves])

    def first_step(self) -> SequenceInputs:
        """The arguments of a call with T = 1: the first step of each sequence."""
        pairs = zip(self.leaves, self.dims, strict=True)
        leaves = [leaf if dim is None else leaf.narrow(dim, 0, 1) for leaf, dim in pairs]
        return replace(self, leaves=leaves, steps=1, T=None if self.T is None else 1)

    def fresh(self) -> SequenceInputs:
        """Detached copies of the arguments; floating-point tensors require gradients."""
        return self.with_leaves(lambda x: x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex()))

    def whole(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the net."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs if self.T is None else {**kwargs, "T": self.T}

    def of_step(self, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model at step t."""
        pairs = zip(self.leaves, self.dims, strict=True)
        # Copies, because a model may change its input in place.
        parts = [leaf if dim is None else leaf.select(dim, t) for leaf, dim in pairs]
        leaves = [part.clone() if isinstance(part, Tensor) else part for part in parts]
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


def _dims_of_leaves(time_dim: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None]:
    """The time dimension of each leaf of `(args, kwargs)`; `time_dim` is a tree prefix of them, or an int for all."""
    prefix = time_dim
    if isinstance(time_dim, dict) and time_dim.keys() == kwargs.keys():
        prefix = ((0,) * len(args), {name: time_dim[name] for name in kwargs})
    elif isinstance(time_dim, tuple | list):
        # One entry for each argument; keyword arguments without an entry have time in dimension 0.
        entries = [*time_dim, *[0] * len(kwargs)] if len(time_dim) == len(args) else [*time_dim]
        prefix = (tuple(entries[: len(args)]), dict(zip(kwargs, entries[len(args) :], strict=False)))
        if len(entries) != len(args) + len(kwargs):
            prefix = ()
    dims = broadcast_prefix(prefix, pytree.tree_structure((args, kwargs)))
    if dims is None:
        raise InputError(
            "SNNFX307",
            "the inputs do not match the net",
            why=f"it was converted with time_dim={time_dim!r}, which is nested differently.",
            hint="Pass the arguments of the model's step method, with a time dimension.",
        )
    return dims
