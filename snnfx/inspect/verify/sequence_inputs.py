"""The arguments of a net, and where time is in each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from snnfx.errors import InputError
from snnfx.sandbox.torch_internals import pytree

__all__ = ["SequenceInputs"]


@dataclass(frozen=True)
class SequenceInputs:
    """The arguments of the net, flattened, with the place of time in each of them."""

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
        with_paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        # A path begins with the place in (args, kwargs), which is no news to the user.
        names = ["input" + pytree.keystr(path[1:]) for path, _ in with_paths]
        leaves = [leaf for _, leaf in with_paths]
        dims = [dim if isinstance(leaf, Tensor) else None for leaf, dim in zip(leaves, dims, strict=True)]
        lengths = {}
        for name, leaf, dim in zip(names, leaves, dims, strict=True):
            if dim is not None:
                if not -leaf.ndim <= dim < leaf.ndim:
                    raise InputError(
                        "SNNFX306", f"`{name}` has no dimension {dim} for time", why=f"it is {leaf.ndim}-d."
                    )
                lengths[name] = leaf.shape[dim]
        if not lengths and T is None:
            raise InputError("SNNFX310", "the number of time steps is not known", hint="Say it: verify(..., T=8).")
        steps = T if T is not None else next(iter(lengths.values()))
        if any(length != steps for length in lengths.values()):
            raise InputError("SNNFX303", f"the inputs do not all have {steps} time steps", why=f"they have {lengths}.")
        if steps < 1:
            raise InputError("SNNFX301", "no time steps", hint="A sequence has at least one time step.")
        return SequenceInputs(leaves, spec, dims, names, steps, T, time_dim if isinstance(time_dim, int) else 0)

    def with_leaves(self, function: Callable[[Tensor], Tensor]) -> SequenceInputs:
        """The same arguments with a function applied to each tensor."""
        return replace(self, leaves=[function(x) if isinstance(x, Tensor) else x for x in self.leaves])

    def fresh(self) -> SequenceInputs:
        """The same values without a history; gradients can be taken with respect to the floating ones."""
        return self.with_leaves(lambda x: x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex()))

    def whole(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the net."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs if self.T is None else {**kwargs, "T": self.T}

    def of_step(self, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model at step t."""
        pairs = zip(self.leaves, self.dims, strict=True)
        # Copies: a model may change its input in place, which is its own business at each step.
        parts = [leaf if dim is None else leaf.select(dim, t) for leaf, dim in pairs]
        leaves = [part.clone() if isinstance(part, Tensor) else part for part in parts]
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]


def _dims_of_leaves(time_dim: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None]:
    """The time dimension of each leaf of `(args, kwargs)`; `time_dim` is a prefix of their nesting, or for all."""
    prefix = time_dim
    if isinstance(time_dim, dict) and time_dim.keys() == kwargs.keys():
        prefix = ((0,) * len(args), {name: time_dim[name] for name in kwargs})
    elif isinstance(time_dim, tuple | list):
        # One entry for each argument; those by keyword may be left out, and have time in front.
        entries = [*time_dim, *[0] * len(kwargs)] if len(time_dim) == len(args) else [*time_dim]
        prefix = (tuple(entries[: len(args)]), dict(zip(kwargs, entries[len(args) :], strict=False)))
        if len(entries) != len(args) + len(kwargs):
            prefix = ()
    dims = pytree._broadcast_to_and_flatten(prefix, pytree.tree_structure((args, kwargs)))
    if dims is None:
        raise InputError("SNNFX307", "the inputs do not fit the net", why=f"its time_dim is {time_dim!r}.")
    return dims
