"""The nodes of a step graph that reports count, and the same node in two programs of one model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import Node

from snnfx.ir.facts import KIND, WHERE
from snnfx.ir.nodes import is_size, takes_from_tuple
from snnfx.ir.printing import describe_node
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.step_functions import expect_size

__all__ = ["NodeKey", "computing_nodes", "is_computing", "nodes_by_key"]

NodeKey = tuple[str, Any, int]
"""Description of a node, its file and line, and the number of equal ones before it."""


def is_computing(node: Node) -> bool:
    """Whether a node computes a value, other than an element of a tuple, a size or a check."""
    if not node.op.startswith("call") or takes_from_tuple(node):
        return False
    return not is_size(node) and node.target is not expect_size


def computing_nodes(region: Region) -> list[Node]:
    """The computing nodes of a region, in program order."""
    return [node for node in region.nodes if is_computing(node)]


def nodes_by_key(program: StepProgram) -> dict[NodeKey, Node]:
    """The computing nodes of one step, by keys that all programs captured from one model share.

    In a partitioned program, nodes that only compute initial values are left out.
    """
    keys: dict[NodeKey, Node] = {}
    count: Counter[tuple[str, Any]] = Counter()
    for node in program.graph.nodes:
        if is_computing(node) and (not program.regions or KIND.is_known(node)):
            key = (describe_node(node), WHERE.of(node))
            keys[(*key, count[key])] = node
            count[key] += 1
    return keys
