"""Checks of sizes in a call that hold for any number of time steps, such as those that a reshape makes of T*N."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node, map_arg

from snnfx.analysis.batch.facts import Fact
from snnfx.ir.facts import VALUE
from snnfx.ir.nodes import is_size

__all__ = ["holds_for_any_length"]

_LENGTHS = (1, 2, 3, 5, 8, 64, 1000)
_BATCHES = (1, 2, 3, 8)


def holds_for_any_length(check: Node, facts: Mapping[Node, Any], steps: int) -> bool:
    """Whether a check depends on the number of time steps, and holds for all of them.

    Args:
        check: a call of `expect_size`.
        facts: node -> where its time dimension is.
        steps: the number of time steps of the capture.
    """
    operand, expected = check.args[:2]
    if not isinstance(operand, Node):
        return False
    computation = _computation(operand)
    tensors = [n for n in computation if not is_size(n)]
    if not all(isinstance(VALUE.of(n), Tensor) and isinstance(facts.get(n), Fact) for n in tensors):
        return False
    with_time = [(n, facts[n].dim) for n in tensors if facts[n].dim is not None]
    # A time dimension of size T*N has the batch folded in.
    folded = {VALUE.of(n).shape[dim] // steps for n, dim in with_time} - {1}
    seen = set()
    for T in _LENGTHS:
        for N in _BATCHES if folded else (0,):
            values: dict[Node, Any] = {n: _resized(n, facts[n].dim, steps, T, folded, N) for n in tensors}
            try:
                for node in computation:
                    if node not in values:
                        values[node] = _evaluated(node, values)
            except (ArithmeticError, LookupError, TypeError, ValueError):
                return False  # the computation has no result for these sizes
            if values[operand] != expected:
                return False
            seen.add(tuple(v for v in values.values() if isinstance(v, int)))
    return len(seen) > 1


def _computation(size: Node) -> list[Node]:
    """The computation of a size, operands first, from the tensors that it reads."""
    found: dict[Node, None] = {}
    stack = [size]
    while stack:
        node = stack[-1]
        missing = [n for n in node.all_input_nodes if n not in found] if is_size(node) else []
        if missing:
            stack += missing
        else:
            found[stack.pop()] = None
    return list(found)


def _resized(node: Node, dim: int | None, steps: int, T: int, folded: set[int], N: int) -> Tensor:
    """A tensor without data with the shape that a node has for T time steps and a batch of N."""
    value = VALUE.of(node)
    shape = [N if size in folded else size for size in value.shape]
    if dim is not None:
        samples = value.shape[dim] // steps
        shape[dim] = T * (N if samples in folded else samples)
    return value.new_empty(shape, device="meta")  # type: ignore[no-any-return]


def _evaluated(node: Node, values: Mapping[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
