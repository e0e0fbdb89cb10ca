"""Predicates on nodes of a step graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from snnfx.ir.facts import BATCH_DIM, SHAPE_LIKE, STRUCTURAL, VALUE
from snnfx.ops.step_functions import expect_size, set_part, set_part_
from snnfx.state.step_calls import call_opaque

__all__ = [
    "IN_PLACE_OPERATORS",
    "descendants",
    "is_in_place",
    "is_in_place_target",
    "is_module_call",
    "is_outside_reader",
    "is_size",
    "is_size_computation",
    "is_structural",
    "object_of",
    "takes_from_tuple",
    "without_detach",
]


def descendants(sources: Iterable[Node]) -> set[Node]:
    """The given nodes and all nodes that depend on them."""
    found = set(sources)
    stack = [*found]
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack.append(user)
    return found


def is_module_call(node: Node) -> bool:
    """Whether the node is a call_function whose first argument is a module (a stateful or opaque leaf)."""
    return (
        node.op == "call_function"
        and getattr(node.target, "snnfx_calls_module", False)
        and bool(node.args)
        and isinstance(node.args[0], Node)
        and node.args[0].op == "get_attr"
    )


def is_structural(node: Node) -> bool:
    """Whether capture inserted the node to take one element of a tuple that a call returned."""
    return node.op == "call_function" and node.target is operator.getitem and bool(STRUCTURAL.of(node))


def is_in_place(node: Node) -> bool:
    """Whether the node is an in-place operation: `x.add_(1)`, `relu(x, inplace=True)`."""
    return is_in_place_target(node.op, node.target) or (
        node.op == "call_function" and node.kwargs.get("inplace") is True
    )


def is_in_place_target(op: str, target: Any) -> bool:
    """Whether a call of this target is an in-place operation."""
    if op == "call_method":
        name = str(target)
        return name.endswith("_") and not name.endswith("__")
    if op != "call_function":
        return False
    name = getattr(target, "__name__", "")
    # `operator.and_` ends in an underscore because `and` is a keyword.
    by_name = name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not target
    return by_name or target in IN_PLACE_OPERATORS


def object_of(node: Node) -> Node:
    """The node whose tensor a chain of in-place operations changes and returns."""
    while is_in_place(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
    set_part_: set_part,
}
"""Operators of augmented assignment (`x += 1`) -> their out-of-place operation."""


def without_detach(node: Node) -> Node:
    """The node whose value the node detaches from the autograd graph, or the node itself."""
    while node.target in ("detach", torch.detach) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def takes_from_tuple(node: Node) -> bool:
    """Whether the node takes one element of any tuple of values.

    The result of an opaque call counts as a tuple if its structure is unknown: only the call knows it.
    """
    if node.op != "call_function" or node.target not in (operator.getitem, getattr) or is_size(node):
        return False
    source = node.args[0]
    if isinstance(source, Node) and isinstance(node.args[1], str | int) and _is_result_of_opaque_call(source):
        return True
    if node.target is getattr:
        return False
    if is_structural(node) or not isinstance(source, Node):
        return True
    value = VALUE.of(source)
    if value is not None:
        return isinstance(value, tuple | list)
    return isinstance(BATCH_DIM.of(source), tuple)


def _is_result_of_opaque_call(node: Node) -> bool:
    """Whether the node is the result of an opaque call, or an element of it, with an unknown structure."""
    while not VALUE.is_known(node) and node.op == "call_function":
        if node.target is call_opaque:
            return True
        if node.target not in (operator.getitem, getattr) or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return False


def is_size(node: Node) -> bool:
    """Whether the value of a node is a size or computed from sizes; each region recomputes the sizes it needs."""
    if node.op not in ("call_function", "call_method") or node.target is expect_size:
        return False
    if SHAPE_LIKE.of(node):
        return not hasattr(VALUE.of(node), "stride")
    return node.target is getattr and node.args[1] in ("dtype", "device")


_NUMBER_MODULES = ("_operator", "builtins", "math")
"""Modules of functions that compute numbers from numbers, such as sizes from sizes."""


def is_size_computation(node: Node) -> bool:
    """Whether the node reads a size of a tensor, or computes a number from sizes alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "ndimension")
    if node.op != "call_function":
        return False
    if node.target is getattr and node.args[1] == "shape":
        return True
    operands = node.all_input_nodes
    in_numbers = getattr(node.target, "__module__", "") in _NUMBER_MODULES
    return in_numbers and bool(operands) and all(SHAPE_LIKE.of(n) for n in operands)


def is_outside_reader(user: Node, layer: set[Node]) -> bool:
    """Whether a user of a value computes with it outside its layer."""
    return user.op != "output" and user not in layer and not is_size(user)
