"""The layers of a step: what of it belongs together through time (an analysis, changes nothing).

A layer is a cycle of the dependence graph, a neuron with all that feeds back into it. Several cycles are one layer when
one module (other than the model itself) keeps their states, or when one of them goes into the other without a weight
between and never fires: the current of a synapse in front of a potential. What lies between them is part of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import networkx as nx
from torch.fx import Node

from snnfx.analysis.dependence import analyse_dependence
from snnfx.analysis.leak import StepOnNumbers, fires
from snnfx.analysis.weight_ops import weight_ops
from snnfx.errors import InputError
from snnfx.ir.nodes import is_outside_reader, takes_from_tuple
from snnfx.ir.program import StepProgram

__all__ = ["find_layers", "leaving_values"]


def find_layers(program: StepProgram) -> list[set[Node]]:
    """The nodes of each layer.

    Raises:
        InputError: SNNFX616, the first step is another one than those after it.
    """
    if program.first_step is not None:
        raise InputError(
            "SNNFX616",
            "this model has no layers that are the same at every step",
            why="its first step computes something else than the others.",
            hint="Use a rule that does not tell layers apart, or make the first step like the others.",
        )
    dependence = analyse_dependence(program)
    cycles = [cycle for cycle in dependence.cycles if any(map(_is_state, cycle)) and len(cycle) > 1]
    cycle_of = {node: number for number, cycle in enumerate(cycles) for node in cycle}
    weights = {op.node for op in weight_ops(program, dependence)}
    together = nx.Graph()
    together.add_nodes_from(range(len(cycles)))
    together.add_edges_from(_kept_by_one_module(cycles))
    together.add_edges_from(_in_front_of_another(program, cycles, cycle_of, weights))
    layers = []
    for numbers in nx.connected_components(together):
        members = {node for number in numbers for node in cycles[number]}
        if len(numbers) > 1:
            after = _reached(members, lambda node: node.users, cycle_of)
            members |= after & _reached(members, lambda node: node.all_input_nodes, cycle_of)
        layers.append(members)
    return layers


def leaving_values(program: StepProgram) -> dict[Node, set[Node]]:
    """The values that something outside of their layer reads, in program order, each with its layer.

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
    return "slot" in node.meta and not node.meta.get("added_by_rule")


def _kept_by_one_module(cycles: list[list[Node]]) -> Iterable[tuple[int, int]]:
    first: dict[str, int] = {}
    for number, cycle in enumerate(cycles):
        for node in cycle:
            owner = node.meta["slot"].rpartition(".")[0] if _is_state(node) else ""
            if owner:
                yield first.setdefault(owner, number), number


def _in_front_of_another(
    program: StepProgram, cycles: list[list[Node]], cycle_of: dict[Node, int], weights: set[Node]
) -> Iterable[tuple[int, int]]:
    step = StepOnNumbers(program)
    for number, cycle in enumerate(cycles):
        if not any(fires(step, program, node.meta["slot"]) for node in cycle if _is_state(node)):
            behind = _reached(cycle, lambda node: [u for u in node.users if u not in weights], cycle_of)
            ahead = {user for node in behind for user in node.users if user in cycle_of and user not in weights}
            yield from ((number, cycle_of[user]) for user in ahead)


def _reached(start: Iterable[Node], following: Callable[[Node], Iterable[Node]], stop: dict[Node, int]) -> set[Node]:
    """The given nodes and what can be reached from them without entering a cycle."""
    found = set(start)
    stack = list(found)
    while stack:
        for node in following(stack.pop()):
            if node not in found and node not in stop and node.op.startswith("call"):
                found.add(node)
                stack.append(node)
    return found
