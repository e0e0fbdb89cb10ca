"""Lists of the values of all iterations: `torch.stack(spikes)`, `torch.cat(spikes)`, `sum(spikes)` become sequences."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.ir.facts import ELEMENT, VALUE
from snnfx.ir.program import StepProgram
from snnfx.ops.elements import concatenate_elements, read_elements, stack_elements

__all__ = ["join_elements"]

_JOINS = {
    torch.stack: stack_elements,
    torch.cat: concatenate_elements,
    torch.concat: concatenate_elements,
    torch.concatenate: concatenate_elements,
}
_SUMS = (operator.add, torch.add, "add")


def join_elements(program: StepProgram) -> str:
    """Replace joins and sums of the elements of a sequence by operations on the sequence; return a note."""
    before = _nodes_that_take_elements(program.graph)
    for node in list(program.graph.nodes):
        if node.target in _JOINS and node.args and isinstance(node.args[0], list | tuple):
            _join(program.graph, node)
        elif node.target in _SUMS:
            _sum(program.graph, node)
    for node in reversed(list(program.graph.nodes)):
        if not ELEMENT.is_known(node):
            continue
        if not node.users:
            program.graph.erase_node(node)
            continue
        sequence = VALUE.of(node.args[0])
        if isinstance(sequence, Tensor) and ELEMENT.of(node) == sequence.shape[0] - 1:
            node.args = (node.args[0], -1)  # the last element for any number of time steps
    return f"replaced {before - _nodes_that_take_elements(program.graph)} reads of single elements"


def _nodes_that_take_elements(graph: fx.Graph) -> int:
    return sum(map(ELEMENT.is_known, graph.nodes))


def _element(value: Any) -> tuple[Node, int] | None:
    """`(sequence, index)` of a node that is the value of one iteration of a loop."""
    if not isinstance(value, Node) or not ELEMENT.is_known(value):
        return None
    return value.args[0], ELEMENT.of(value)  # type: ignore[return-value]


def _runs(values: list[Any]) -> list[tuple[Node, int, int, int] | Any]:
    """Values with consecutive elements of one sequence replaced by `(sequence, start, step, count)`."""
    runs: list[Any] = []
    for value in values:
        element = _element(value)
        last = runs[-1] if runs else None
        if element is None:
            runs.append(value)
        elif isinstance(last, tuple) and last[0] is element[0] and _continues(last, element[1]):
            runs[-1] = (last[0], last[1], element[1] - (last[1] + (last[3] - 1) * last[2]), last[3] + 1)
        else:
            runs.append((element[0], element[1], 1, 1))
    return runs


def _continues(run: tuple[Node, int, int, int], index: int) -> bool:
    _, start, step, count = run
    difference = index - (start + (count - 1) * step)
    return difference in (1, -1) if count == 1 else difference == step


def _join(graph: fx.Graph, node: Node) -> None:
    runs = _runs(list(node.args[0]))  # type: ignore[arg-type]
    if not any(isinstance(r, tuple) and r[3] > 1 for r in runs):
        return
    with graph.inserting_before(node):
        parts = [_sequence(graph, r) if isinstance(r, tuple) else r for r in runs]
        arguments = (parts, [isinstance(r, tuple) for r in runs], *node.args[1:])
        new = graph.call_function(_JOINS[node.target], arguments, dict(node.kwargs))  # type: ignore[index]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _sequence(graph: fx.Graph, run: tuple[Node, int, int, int]) -> Node:
    sequence, start, step, count = run
    node = graph.call_function(read_elements, (sequence, 0, start, step, count))
    value = VALUE.of(sequence)
    if isinstance(value, Tensor):
        VALUE.set(node, value.new_empty((count, *value.shape[1:])))
    return node


def _sum(graph: fx.Graph, node: Node) -> None:
    """Replace the last addition of `((start + y[0]) + y[1]) + ...` by `start + y.sum(0)`."""
    if any(user.target in _SUMS and _added_element(user) is not None and user.args[0] is node for user in node.users):
        return
    chain: list[Node] = []
    current: Any = node
    while (
        isinstance(current, Node)
        and current.target in _SUMS
        and len(current.args) == 2
        and not current.kwargs
        and _added_element(current) is not None
        and (current is node or len(current.users) == 1)
    ):
        chain.append(current)
        current = current.args[0]
    runs = _runs([n.args[1] for n in reversed(chain)])
    if len(runs) != 1 or not isinstance(runs[0], tuple) or runs[0][3] < 2:
        return
    with graph.inserting_before(node):
        total = graph.call_function(torch.sum, (_sequence(graph, runs[0]), 0))
        total.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
        new = (
            total
            if isinstance(current, int | float) and current == 0
            else graph.call_function(operator.add, (current, total))
        )
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    for addition in chain:
        graph.erase_node(addition)


def _added_element(node: Node) -> tuple[Node, int] | None:
    return _element(node.args[1]) if len(node.args) == 2 else None
