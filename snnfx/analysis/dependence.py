"""Dependence analysis: the dependence graph of a step program, with loop-carried edges.

The graph has the edges of the step graph plus one from each slot's next value to the slot's placeholder: the value at
step t is read at step t + 1. The calls that update one buffer and the reads of it are joined in program order. A node
on a cycle is sequential; every other node is parallel in time.
Source: Kuck et al. 1981; Kennedy & Allen, Optimizing Compilers for Modern Architectures, ch. 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import networkx as nx
from torch import nn
from torch.fx import Node

from snnfx.analysis.statistic_reads import is_statistic_read, update_chains
from snnfx.ir.module_effects import has_effects
from snnfx.ir.nodes import is_size
from snnfx.ir.program import StepProgram
from snnfx.ops.operator_lookup import traits_of, traits_of_module
from snnfx.ops.step_functions import expect_size
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_opaque, call_stateful, initial_value

__all__ = [
    "Dependence",
    "analyse_dependence",
    "ancestors",
    "is_random",
    "may_be_random",
    "operands_through_sizes",
]


@dataclass(frozen=True)
class Dependence:
    """The result of `analyse_dependence`.

    Args:
        graph: operand -> user, plus next value -> slot placeholder with the edge attribute ``carried=True``.
        cycles: strongly connected components: nodes that depend on themselves through time, in program order.
        varying: nodes whose value may differ between time steps.
        initial_only: nodes that only compute initial values; they run on the first step only.
        carried: slot placeholder -> its next value (a node or a constant).
    """

    graph: nx.DiGraph
    cycles: list[list[Node]]
    varying: set[Node]
    initial_only: set[Node]
    carried: dict[Node, object]

    @property
    def sequential(self) -> set[Node]:
        """All nodes on a cycle."""
        return {node for cycle in self.cycles for node in cycle}


def analyse_dependence(
    program: StepProgram, invariant_inputs: Iterable[str] = (), changing: Callable[[Node], bool] | None = None
) -> Dependence:
    """Find the cycles through time and the nodes that vary in time.

    Args:
        program: at stage "normalized" or later.
        invariant_inputs: placeholders of inputs that do not change with time.
        changing: a predicate for further nodes that must run at every step, even with invariant operands, and for the
            reads of statistics that differ between steps. Default: all reads of updated statistics.
    """
    changing = changing or is_statistic_read
    graph = nx.DiGraph()
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        graph.add_node(node)
        graph.add_edges_from((operand, node) for operand in node.all_input_nodes)
    carried: dict[Node, object] = {}
    for placeholder, following in zip(program.slot_nodes(), program.next_states, strict=True):
        carried[placeholder] = following
        if isinstance(following, Node):
            graph.add_edge(following, placeholder, carried=True)
    for chain in update_chains(program):
        graph.add_edges_from(itertools.pairwise(chain))
        if any(changing(node) and not is_statistic_read(node) for node in chain):
            # The buffer is carried from call to call, and from the last node of a step to the first of the next.
            graph.add_edge(chain[-1], chain[0], carried=True)
    cycles = [
        sorted(component, key=position.__getitem__)
        for component in nx.strongly_connected_components(graph)
        if len(component) > 1 or graph.has_edge(*(2 * tuple(component)))
    ]
    cycles.sort(key=lambda cycle: position[cycle[0]])
    fixed = set(invariant_inputs)
    varying: set[Node] = set()
    stack = [
        node
        for node in program.graph.nodes
        if (node.op == "placeholder" and node.name not in fixed) or is_random(program, node) or changing(node)
    ]
    while stack:
        node = stack.pop()
        if node not in varying and node.op != "output":
            varying.add(node)
            stack.extend(user for user in node.users if not is_statistic_read(user))
    return Dependence(graph, cycles, varying, _initial_only(program), carried)


def _initial_only(program: StepProgram) -> set[Node]:
    """Nodes that no output, next state, size check, buffer update or read of an updated buffer depends on."""
    needed: set[Node] = set()
    roots = [n for n in (*program.outputs, *program.next_states) if isinstance(n, Node)]
    # A read of an updated buffer must run between the calls that update it.
    stack = roots + [
        n for n in program.graph.nodes if n.target is expect_size or is_statistic_read(n) or has_effects(program, n)
    ]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return {n for n in program.graph.nodes if n.op.startswith("call") and n not in needed}


def is_random(program: StepProgram, node: Node) -> bool:
    """Whether a node draws random numbers at every step."""
    if node.op == "call_module":
        module = program.resolve(str(node.target))
        return any(_draws(m) for m in module.modules())
    if not node.op.startswith("call"):
        return False
    random = traits_of(node).random
    if random == "training":
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is not False
    if random == "dropout_p":
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    return bool(random)


def may_be_random(program: StepProgram, node: Node) -> bool:
    """Whether a call may draw random numbers, also at the first step only (a dropout with one mask)."""
    if is_random(program, node):
        return True
    if node.target not in (call_stateful, call_opaque, initial_value):
        return False
    module = program.module_of(node)
    if module is None or node.target is call_opaque or adapter_of(module) is None:
        return True
    return any(not _is_known_deterministic(part) for part in module.modules())


def _is_known_deterministic(module: nn.Module) -> bool:
    """Whether a module of a known library draws no random numbers."""
    name, package = type(module).__name__.lower(), type(module).__module__.partition(".")[0]
    draws = _draws(module) or "drop" in name
    return package in ("torch", "snnfx", "spikingjelly", "snntorch", "norse") and not draws


def _draws(module: nn.Module) -> bool:
    """Whether a layer of torch draws random numbers in training."""
    random = traits_of_module(module).random
    return bool(random and (random in ("always", "training") or getattr(module, random)))


def ancestors(roots: Iterable[Node]) -> set[Node]:
    """The given nodes and all nodes that they depend on."""
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def operands_through_sizes(node: Node) -> list[Node]:
    """The operands of a node, with each size replaced by the tensor it was read from."""
    found: list[Node] = []
    stack = list(node.all_input_nodes)
    while stack:
        operand = stack.pop()
        if is_size(operand):
            stack.extend(operand.all_input_nodes)
        elif operand not in found:
            found.append(operand)
    return found
