"""Run an FX graph node by node, freeing each value after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

__all__ = ["Caller", "walk"]

Caller = Callable[[Node, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Calls one node: `(node, function, args, kwargs) -> value`."""


def walk(graph: Graph, resolve: Callable[[str], Any], inputs: Mapping[str, Any], call: Caller) -> Any:
    """Run a graph and return the argument of its output node.

    Args:
        graph: the graph.
        resolve: the object of a get_attr or call_module target.
        inputs: values of the placeholders, by node name; the others take their default.
        call: runs each call node.
    """
    nodes = list(graph.nodes)
    last_use = {operand: node for node in nodes for operand in node.all_input_nodes}
    values: dict[Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = inputs[node.name] if node.name in inputs else (node.args[0] if node.args else None)
            continue
        if node.op == "get_attr":
            values[node] = resolve(str(node.target))
            continue
        args = map_arg(node.args, values.__getitem__)
        if node.op == "output":
            return args[0]
        kwargs = map_arg(node.kwargs, values.__getitem__)
        function = node.target
        if node.op == "call_module":
            function = resolve(str(node.target))
        elif node.op == "call_method":
            function, args = getattr(args[0], str(node.target)), args[1:]
        values[node] = call(node, function, args, kwargs)
        for operand in {*node.all_input_nodes, node}:
            if last_use.get(operand, node) is node:
                values.pop(operand, None)
    return None
