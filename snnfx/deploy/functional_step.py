"""Record one time step as an ATen graph without side effects, for the body of a `scan`.

A `scan` body must be functional, must not close over tensors, and must not return its arguments or one tensor twice.
The model's code satisfies none of these: masks are written in place, parameters and tensors made in the step are
constants, and a neuron may return its potential as output and as state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.ir.facts import VALUE
from snnfx.sandbox.torch_internals import proxies_disabled, record_aten

__all__ = ["functional_step"]


def functional_step(
    step: Callable[..., Any], arguments: Sequence[Tensor], more: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """Record `step(*arguments, *more)`, which returns a flat sequence of tensors.

    Args:
        step: runs once, on fake tensors.
        arguments: examples of the carried values and of the inputs of one step.
        more: tensors that are the same at every step.

    Returns:
        `(graph, constants)`: the graph takes `(*arguments, *constants)`; the constants are the used ones of `more` and
        the tensors that the step closes over.
    """
    with proxies_disabled():
        examples = [t.clone() for t in (*arguments, *more)]
        recorded = record_aten(step, examples)
        closed_over = _lift_constants(recorded)
        everything = [*more, *closed_over]
        functional = torch.func.functionalize(recorded, remove="mutations")
        recorded = record_aten(functional, [*examples, *(t.clone() for t in closed_over)])
    _merge_equal_calls(recorded.graph)
    _separate_results(recorded.graph)
    recorded.graph.eliminate_dead_code()
    constants = _drop_unused(recorded.graph, len(arguments), everything)
    recorded.recompile()
    return recorded, constants


def _lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Turn the constants of a recording into further arguments; returns their values."""
    graph, constants = module.graph, list[Tensor]()
    by_identity: dict[int, Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if id(value) not in by_identity:
            with graph.inserting_after(last):
                last = by_identity[id(value)] = graph.placeholder(f"constant_{len(constants)}")
            constants.append(value)
        node.replace_all_uses_with(by_identity[id(value)])
        graph.erase_node(node)
    module.recompile()
    return constants


def _merge_equal_calls(graph: fx.Graph) -> None:
    """Merge calls of one function on the same arguments: `torch.export` merges them, and then two results are one."""
    first: dict[str, Node] = {}
    for node in list(graph.nodes):
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags:
            continue
        key = f"{node.target} {node.args!r} {node.kwargs!r}"
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _separate_results(graph: fx.Graph) -> None:
    """Clone results that are arguments, views or returned twice: `scan` refuses results that may share memory."""
    output = graph.output_node()
    last_copy: dict[Node, Node] = {}
    results = []
    with graph.inserting_before(output):
        for node in output.args[0]:  # type: ignore[union-attr]
            assert isinstance(node, Node)
            result = node
            if node in last_copy or node.op != "call_function" or _is_view(node):
                # A clone of the last copy, because two clones of one value would be merged.
                result = graph.call_function(torch.ops.aten.clone.default, (last_copy.get(node, node),))
                VALUE.set(result, VALUE.of(node))
            last_copy[node] = result
            results.append(result)
    output.args = (tuple(results),)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _drop_unused(graph: fx.Graph, kept: int, values: Sequence[Tensor]) -> list[Tensor]:
    """Erase the arguments after the first `kept` that nothing reads; returns the values of the others."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"][kept:]
    used = []
    for node, value in zip(placeholders, values, strict=True):
        if node.users:
            used.append(value)
        else:
            graph.erase_node(node)
    return used
