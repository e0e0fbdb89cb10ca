"""The roles of arguments in the step of a loop: own and carried values, values from outside, and varying values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.sequence.reason_at_node import ReasonAtNode

__all__ = [
    "Carried",
    "DependsOnLength",
    "Differs",
    "Outside",
    "Own",
    "Varying",
    "has_type_of",
    "map_roles",
    "operation",
]


class Differs(ReasonAtNode):
    """The iterations do not run the same step."""


class DependsOnLength(Differs):
    """The iterations compute with a number that no expression of the number of time steps gives."""


@dataclass(frozen=True)
class Own:
    """The value at a position of the same iteration."""

    position: int


@dataclass(frozen=True)
class Carried:
    """The value at a position of the previous iteration."""

    position: int


@dataclass(frozen=True)
class Outside:
    """A value from outside the loop, the same in each iteration."""

    node: Node


@dataclass(frozen=True)
class Varying:
    """Values from outside the loop, or numbers, one for each iteration."""

    values: tuple[Any, ...]


def map_roles(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to all roles in nested arguments."""
    if isinstance(tree, Own | Carried | Outside | Varying):
        return function(tree)
    if isinstance(tree, tuple):
        values = [map_roles(v, function) for v in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if isinstance(tree, list):
        return [map_roles(v, function) for v in tree]
    if isinstance(tree, dict):
        return {k: map_roles(v, function) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_roles(v, function) for v in (tree.start, tree.stop, tree.step)))
    return tree


def has_type_of(value: Node, like: Node) -> bool:
    """Whether two nodes are tensors of one shape and dtype."""
    a, b = value.meta.get("val"), like.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


_METHODS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


def operation(node: Node) -> tuple[str, Any]:
    """The operation of a node; `tensor + proxy` is recorded as a method, `proxy + proxy` as an operator."""
    if node.op == "call_method" and node.target in _METHODS and not node.kwargs:
        return "call_function", _METHODS[str(node.target)]
    return node.op, node.target
