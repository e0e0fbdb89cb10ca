"""The arguments that an operator of ATen writes, from the alias annotations of its schema."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from snnfx.sandbox.torch_internals import pytree

__all__ = ["written_arguments", "written_tensors"]


@functools.cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operator writes; none for an operator without a schema.

    Example:
        >>> import torch
        >>> written_arguments(torch.ops.aten.add_.Tensor)
        ((0, 'self'),)
        >>> written_arguments(torch.ops.aten.add.Tensor)
        ()
    """
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def written_tensors(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call of an operator writes in place."""
    written: list[Tensor] = []
    for position, name in written_arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        written.extend(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    return written
