"""Form maximal connected convex regions of one kind (typed fusion, Kennedy & McKinley 1993)."""

from __future__ import annotations

import itertools

import networkx as nx
from torch.fx import Node

from snnfx.analysis.dependence import Dependence, operands_through_sizes
from snnfx.analysis.statistic_reads import update_chains
from snnfx.errors import CaptureError
from snnfx.ir.facts import SLOT
from snnfx.ir.nodes import takes_from_tuple
from snnfx.ir.printing import location_of
from snnfx.ir.program import Region, StepProgram

__all__ = ["form_regions"]

_MERGED_KINDS = ("once", "fold", "map")


def form_regions(program: StepProgram, dependence: Dependence, kinds: dict[Node, str]) -> list[Region]:
    """The regions of a program in execution order.

    Args:
        program: at stage "normalized".
        dependence: its dependence analysis.
        kinds: computing node -> "once", "fold", "map", "per_step" (mapped), "loop", "step" (a loop of one node),
            "read" (a statistic that is the same at every step) or "norm" (a BatchNorm that folds T into dim 0).

    Raises:
        CaptureError: SNNFX210, an initial value depends on a value that needs this state.
    """
    groups = _Groups(program, dependence, kinds)
    for cycle in dependence.cycles:
        groups.join_all(cycle)
    for node in kinds:
        if takes_from_tuple(node) and node.args[0] in kinds:
            groups.join_all([node.args[0], node])  # type: ignore[list-item]
    groups.connect()
    groups.grow(kinds)
    return groups.regions(kinds)


class _Groups:
    """Disjoint groups of nodes, and the acyclic graph between groups."""

    def __init__(self, program: StepProgram, dependence: Dependence, kinds: dict[Node, str]) -> None:
        self.program, self.dependence, self.kinds = program, dependence, kinds
        self.position = {node: i for i, node in enumerate(program.graph.nodes)}
        self.group: dict[Node, int] = {}
        self.members: dict[int, list[Node]] = {}
        for node in program.graph.nodes:
            if node in kinds or (node.op == "placeholder" and SLOT.is_known(node)):
                self.group[node] = self.position[node]
                self.members[self.position[node]] = [node]
        self.graph = nx.DiGraph()

    def join_all(self, nodes: list[Node]) -> None:
        """Merge the groups of the given nodes."""
        first = self.group[nodes[0]]
        for node in nodes[1:]:
            other = self.group[node]
            if other != first:
                for member in self.members.pop(other):
                    self.group[member] = first
                    self.members[first].append(member)

    def connect(self) -> None:
        """Build the graph between groups from operands (through sizes), delays and initial values."""
        self.graph.add_nodes_from(self.members)
        for node, group in self.group.items():
            for operand in operands_through_sizes(node):
                self._edge(operand, group)
            if SLOT.is_known(node) and node.op == "placeholder":
                following = self.dependence.carried[node]
                if isinstance(following, Node) and self.group.get(following) != group:
                    self._edge(following, group)
        self._keep_order_of_updates()
        initial = dict(zip(self.program.slot_nodes(), self.program.initial_values, strict=True))
        for placeholder, value in initial.items():
            if isinstance(value, Node):
                for operand in self._grouped_ancestors(value):
                    self._edge(operand, self.group[placeholder])
        if not nx.is_directed_acyclic_graph(self.graph):
            self._refuse_circular_initial_value()

    def _keep_order_of_updates(self) -> None:
        """Keep the order of the calls that update one buffer, and of the reads of it."""
        for chain in update_chains(self.program):
            for node, following in itertools.pairwise(chain):
                if following in self.group:
                    self._edge(node, self.group[following])

    def _grouped_ancestors(self, value: Node) -> set[Node]:
        """The nearest grouped nodes that an initial value depends on."""
        found: set[Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if node in self.group:
                found.add(node)
            else:
                stack.extend(node.all_input_nodes)
        return found

    def _edge(self, operand: Node, group: int) -> None:
        source = self.group.get(operand)
        if source is not None and source != group:
            self.graph.add_edge(source, group)

    def _refuse_circular_initial_value(self) -> None:
        cycle = nx.find_cycle(self.graph)
        slots = [SLOT.of(n) for edge in cycle for n in self.members[edge[0]] if SLOT.is_known(n)]
        where = next((location_of(n) for edge in cycle for n in self.members[edge[0]] if location_of(n)), "")
        raise CaptureError(
            "SNNFX210",
            f"the initial value of {', '.join(slots)} cannot be computed",
            where=where,
            why="it depends on a value that needs this state.",
            hint="Pass a number or a tensor to register_memory, or make the initial value depend on the inputs only.",
        )

    def grow(self, kinds: dict[Node, str]) -> None:
        """Merge adjacent groups of one kind while the graph between groups stays acyclic."""
        changed = True
        while changed:
            changed = False
            for node in sorted(self.group, key=self.position.__getitem__):
                if kinds.get(node) not in _MERGED_KINDS:
                    continue
                for operand in sorted(operands_through_sizes(node), key=self.position.__getitem__, reverse=True):
                    if kinds.get(operand) == kinds[node] and self._merge(self.group[operand], self.group[node]):
                        changed = True

    def _merge(self, first: int, second: int) -> bool:
        if first == second or not self.graph.has_edge(first, second):
            return False
        if self._has_indirect_path(first, second):
            return False
        for successor in list(self.graph.successors(second)):
            self.graph.add_edge(first, successor)
        for predecessor in list(self.graph.predecessors(second)):
            if predecessor != first:
                self.graph.add_edge(predecessor, first)
        self.graph.remove_node(second)
        for member in self.members.pop(second):
            self.group[member] = first
            self.members[first].append(member)
        return True

    def _has_indirect_path(self, first: int, second: int) -> bool:
        stack = [s for s in self.graph.successors(first) if s != second]
        seen: set[int] = set(stack)
        while stack:
            for successor in self.graph.successors(stack.pop()):
                if successor == second:
                    return True
                if successor not in seen:
                    seen.add(successor)
                    stack.append(successor)
        return False

    def regions(self, kinds: dict[Node, str]) -> list[Region]:
        """The groups in topological order, with ties in program order."""
        first = {group: min(self.position[n] for n in members) for group, members in self.members.items()}
        names = {"per_step": "map", "step": "loop", "read": "once", "norm": "fold"}
        regions: list[Region] = []
        for group in nx.lexicographical_topological_sort(self.graph, key=first.__getitem__):
            members = sorted(self.members[group], key=self.position.__getitem__)
            computing = [n for n in members if n in kinds]
            if not computing:
                continue
            kind = kinds[computing[-1]]
            kind = names.get(kind, kind)
            slots = [SLOT.of(n) for n in members if SLOT.is_known(n) and n.op == "placeholder"]
            regions.append(Region(f"{kind}_{len(regions)}", kind, members, slots))
        return regions
