"""Find the states whose shape decides the result of a step, so that their initial value must not be expanded.

A net starts each loop with states of their final shape: an initial value `[1, C]` is expanded to `[N, C]`. Element-wise
readers give the same result for both, and so do products with weights. A sum over the state does not.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.ir.facts import KIND, SLOT
from snnfx.ir.nodes import is_module_call, is_size
from snnfx.ir.program import StepProgram
from snnfx.ops.operator_lookup import operation_of, traits_of, traits_of_module
from snnfx.sandbox.torch_internals import disable_dispatch_modes

__all__ = ["unexpanded_dimensions"]

_NO_DIMENSION = frozenset(("norm", "std", "var", "quantile", "roll"))
"""Operations whose second argument is not a dimension."""


def unexpanded_dimensions(program: StepProgram, state: Node, initial: Any, skip: Collection[Node] = ()) -> int | None:
    """The expansions of the initial value of a state that do not change the results of its readers.

    Args:
        program: a partitioned program.
        state: the placeholder of the slot.
        initial: the initial value of the slot. Linear readers of zeros give zeros, whatever the shape.
        skip: readers that get the initial value itself.

    Returns:
        The number of last dimensions that must not be expanded; -1: only dimension 0 may be expanded, and no dimension
        added; None: no expansion at all.
    """
    found = set(_rules(program, state, skip, _is_zero(program, initial)))
    if None in found:
        return None
    return -1 if -1 in found else max(found, default=0)  # type: ignore[type-var]


def _rules(program: StepProgram, state: Node, skip: Collection[Node], is_zero: bool) -> Iterator[int | None]:
    small, stack = {state}, [(state, is_zero)]
    while stack:
        node, node_is_zero = stack.pop()
        for user in node.users:
            if user in small or user in skip or user.op == "output":
                continue
            others = [operand for operand in user.all_input_nodes if operand not in small]
            user_is_zero = node_is_zero and _keeps_zeros(user, node)
            rule = 0 if user_is_zero else _rule(program, user, small, others)
            yield rule
            # Next to a value of the current step, the state has its final shape after the operation.
            if rule is not None and not any(map(_depends_on_step, others)):
                small.add(user)
                stack.append((user, user_is_zero))


def _keeps_zeros(node: Node, operand: Node) -> bool:
    """Whether the result is zero, in any shape, if the operand is zero."""
    traits = traits_of(node)
    if traits.linear == "all":
        return node.all_input_nodes == [operand] and all(isinstance(a, Node) for a in node.args)
    is_first = traits.linear == "first" and not traits.offset and node.args[:1] == (operand,)
    return is_first or traits.linear == "each"


def _is_zero(program: StepProgram, initial: Any) -> bool:
    """Whether an initial value is a constant tensor of zeros; parameters and buffers may change after the emission."""
    value = program.constants.get(str(initial.target)) if isinstance(initial, Node) else initial
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    with disable_dispatch_modes():  # an export emits under torch's tracers
        return not value.any()


def _rule(program: StepProgram, user: Node, small: Collection[Node], others: list[Node]) -> int | None:
    """The expansions of the operands in `small` that change only the shape of the result."""
    traits = traits_of(user)
    module = program.resolve(str(user.target)) if user.op == "call_module" else None
    if isinstance(module, nn.Module):
        traits = traits_of_module(module)
    if traits.elementwise or (is_module_call(user) and not traits.mixes):
        return 0
    if traits.number or is_size(user):
        return None
    if traits.product:
        return 0 if user.args and user.args[0] in small and not any(map(_depends_on_step, others)) else None
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape)
    last = _last_dimensions(user)
    if last:
        return last
    return -1 if traits.view or user.target is operator.getitem or KIND.of(user) == "fold" else None


def _last_dimensions(node: Node) -> int:
    """How many of the last dimensions an operation needs; 0 if its dimensions are counted from the front."""
    operation, rest = operation_of(node), node.args[1:]
    if operation == "layer_norm":
        shape = rest[0] if rest else node.kwargs.get("normalized_shape")
        return len(shape) if isinstance(shape, Sequence) else 0
    keeps = node.kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
    if traits_of(node).linear and not keeps and operation in ("sum", "mean"):
        return 0
    dims: Any = node.kwargs.get("dim", rest[0] if rest and operation not in _NO_DIMENSION else None)
    dims = [dims] if isinstance(dims, int) else dims
    if isinstance(dims, Sequence) and dims and all(isinstance(d, int) and d < 0 for d in dims):
        return -int(min(dims))
    return 0


def _depends_on_step(node: Node) -> bool:
    return bool(node.meta.get("varying")) or (node.op == "placeholder" and not SLOT.is_known(node))
