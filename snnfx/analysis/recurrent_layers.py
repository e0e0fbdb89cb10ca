"""Find the recurrent layers of a step: neurons with their feedback.

A layer is a cycle of the dependence graph: a neuron with all nodes that feed back into it. Several cycles form one
layer if their states belong to one module (other than the model itself), or if one of them never fires and feeds
another without a weight between (a synaptic current that feeds a membrane potential). The nodes between them belong to
the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import networkx as nx
from torch.fx import Node

from snnfx.analysis.dependence import analyse_dependence
from snnfx.analysis.leak import fires
from snnfx.analysis.step_on_numbers import StepOnNumbers
from snnfx.analysis.weight_ops import weight_ops
from snnfx.errors import InputError
from snnfx.ir.facts import ADDED_BY_RULE, SLOT
from snnfx.ir.nodes import is_outside_reader, takes_from_tuple
from snnfx.ir.program import StepProgram

__all__ = ["find_layers", "leaving_values"]


def find_layers(program: StepProgram) -> list[set[Node]]:
    """The nodes of each recurrent layer.

    Raises:
        InputError: SNNFX616, the graph of the first step differs from the later steps.
    """
    if program.first_step is not None:
        raise InputError(
            "SNNFX616",
            "this model does not have the same layers at every step",
            why="the graph of its first step differs from the later steps (SNNFX212).",
            hint="Use a rule without layers (not OSTL), or run the same operations at every step.",
        )
    dependence = analyse_dependence(program)
    cycles = [cycle for cycle in dependence.cycles if any(map(_is_state, cycle)) and len(cycle) > 1]
    cycle_of = {node: number for number, cycle in enumerate(cycles) for node in cycle}
    weights = {op.node for op in weight_ops(program, dependence)}
    layer_graph = nx.Graph()
    layer_graph.add_nodes_from(range(len(cycles)))
    layer_graph.add_edges_from(_pairs_in_one_module(cycles))
    layer_graph.add_edges_from(_pairs_without_weight(program, cycles, cycle_of, weights))
    layers = []
    for numbers in nx.connected_components(layer_graph):
        members = {node for number in numbers for node in cycles[number]}
        if len(numbers) > 1:
            after = _reached(members, lambda node: node.users, cycle_of)
            members |= after & _reached(members, lambda node: node.all_input_nodes, cycle_of)
        layers.append(members)
    return layers


def leaving_values(program: StepProgram) -> dict[Node, set[Node]]:
    """The outputs of layers (values read outside their layer) in program order, each with its layer.

    Raises:
        InputError: as `find_layers`.
    """
    layer_of = {node: layer for layer in find_layers(program) for node in layer}
    tuples: set[Node] = set()
    for node in program.graph.nodes:
        source = node.args[0] if takes_from_tuple(node) else None
        if isinstance(source, Node) and source in layer_of:
            tuples.add(source)
            layer_of[source].add(node)
            layer_of[node] = layer_of[source]
    outputs = set(program.outputs)
    return {
        node: layer_of[node]
        for node in program.graph.nodes
        if node in layer_of
        and node not in tuples
        and (node in outputs or any(is_outside_reader(user, layer_of[node]) for user in node.users))
    }


def _is_state(node: Node) -> bool:
    return SLOT.is_known(node) and not ADDED_BY_RULE.of(node)


def _pairs_in_one_module(cycles: list[list[Node]]) -> Iterable[tuple[int, int]]:
    first: dict[str, int] = {}
    for number, cycle in enumerate(cycles):
        for node in cycle:
            owner = SLOT.of(node).rpartition(".")[0] if _is_state(node) else ""
            if owner:
                yield first.setdefault(owner, number), number


def _pairs_without_weight(
    program: StepProgram, cycles: list[list[Node]], cycle_of: dict[Node, int], weights: set[Node]
) -> Iterable[tuple[int, int]]:
    step = StepOnNumbers(program)
    for number, cycle in enumerate(cycles):
        if not any(fires(step, program, SLOT.of(node)) for node in cycle if _is_state(node)):
            reachable = _reached(cycle, lambda node: [u for u in node.users if u not in weights], cycle_of)
            fed = {user for node in reachable for user in node.users if user in cycle_of and user not in weights}
            yield from ((number, cycle_of[user]) for user in fed)


def _reached(start: Iterable[Node], following: Callable[[Node], Iterable[Node]], stop: dict[Node, int]) -> set[Node]:
    """The given nodes and the calls reachable from them without entering a node of `stop`."""
    found = set(start)
    stack = list(found)
    while stack:
        for node in following(stack.pop()):
            if node not in found and node not in stop and node.op.startswith("call"):
                found.add(node)
                stack.append(node)
    return found
