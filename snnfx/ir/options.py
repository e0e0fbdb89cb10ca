"""The options of `snnfx.convert`, stored with the net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from snnfx.errors import InputError
from snnfx.ir.graph_pass import Pass
from snnfx.ir.program import StepProgram
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import OutputPath

__all__ = ["ConvertKeywords", "ConvertOptions", "time_dims_of_leaves"]


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `snnfx.convert`; see there."""

    step_mode: str = "m"
    time_dim: Any = 0
    entry: str = "forward"
    batch_norm: str = "fold"
    chunk: int | str | None = "auto"
    carry_state: bool = False
    reduce: str | None = None
    carry: dict[str, OutputPath] | None = None
    memory_format: str | None = "auto"
    lower: str | None = "auto"
    checkpoint: int | str | None = "auto"
    memory_budget: int | float | None = None
    passes: Sequence[Pass] = ()
    takes: str = "step"

    @property
    def stores_state(self) -> bool:
        """Whether the net stores the state after a call and starts the next call from it."""
        return self.carry_state or (self.step_mode == "s" and self.takes == "step")


class ConvertKeywords(TypedDict, total=False):
    """The keyword arguments of `snnfx.convert`, for functions that forward them."""

    example_inputs: Any
    time_dim: Any
    entry: str
    batch_norm: str | None
    takes: str
    chunk: int | str | None
    carry_state: bool
    reduce: str | None
    carry: Mapping[str, Any] | None
    memory_format: str | None
    lower: str | None
    checkpoint: int | str | None
    memory_budget: int | float | str | None
    passes: Sequence[Pass]


def time_dims_of_leaves(time_dim: Any, program: StepProgram) -> list[int | None]:
    """The time dimension of each leaf of the arguments.

    `time_dim` is a prefix of the argument pytree, as `in_dims` of `torch.vmap`.

    Raises:
        InputError: SNNFX309, `time_dim` is a bool or does not match the arguments.
    """
    count = len(program.input_leaves)
    if any(isinstance(dim, bool) for dim in pytree.tree_leaves(time_dim)):
        raise InputError(
            "SNNFX309",
            f"time_dim={time_dim!r} contains a bool",
            why="a time dimension is an int.",
            hint="Pass the position of T as an int, or None for an input that does not change with time.",
        )
    if time_dim is None or isinstance(time_dim, int):
        return [time_dim] * count
    numbered = pytree.tree_unflatten(list(range(count)), program.input_spec)
    args, kwargs = numbered
    dims: list[int | None] = [0] * count

    def spread(prefix: Any, tree: Any) -> None:
        if prefix is None or isinstance(prefix, int):
            for index in pytree.tree_leaves(tree):
                dims[index] = prefix
        elif isinstance(prefix, dict) and isinstance(tree, dict) and prefix.keys() == tree.keys():
            for key in prefix:
                spread(prefix[key], tree[key])
        elif isinstance(prefix, tuple | list) and isinstance(tree, tuple | list) and len(prefix) == len(tree):
            for p, t in zip(prefix, tree, strict=True):
                spread(p, t)
        else:
            raise InputError(
                "SNNFX309",
                f"time_dim={time_dim!r} does not match the arguments",
                why=f"one step takes {len(args)} positional and {sorted(kwargs)} keyword arguments.",
                hint="Pass an int, or one entry for each argument; None for an input that does not change with time.",
            )

    spread(time_dim, kwargs if isinstance(time_dim, dict) else tuple(args) if not kwargs else (*args, *kwargs.values()))
    return dims
