"""Find the nodes that the iterations of a loop share, and those that only some of them have."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator

import networkx as nx
from torch.fx import Node

from snnfx.ir.facts import WHERE
from snnfx.ir.module_effects import statistics_of_function
from snnfx.ir.program import StepProgram
from snnfx.sequence.loop_runs import LoopRun
from snnfx.sequence.roles import operation

__all__ = ["SharedNodes", "matched_places"]


class SharedNodes:
    """The nodes of a loop, with those at one place of the iterations joined to one vertex.

    Args:
        program: the program of the call.
        run: the loop.

    Attributes:
        vertex: the vertex of each node; a node that has no place in other iterations is its own.
        modules: the nodes that call another module in each iteration, or update other running statistics.
        single: the nodes that only some of the iterations behind the first run.
    """

    def __init__(self, program: StepProgram, run: LoopRun) -> None:
        self.program, self.run = program, run
        self.vertex: dict[Node, Hashable] = {}
        self.modules: list[Node] = []
        self.single: list[Node] = []
        self._match()

    def _match(self) -> None:
        bodies = self.run.bodies[1:]
        keys = [[self._key(n) for n in body] for body in bodies]
        template = min(keys, key=len) if keys else []
        places = [matched_places(template, k) for k in keys]
        shared = [p for p in range(len(template)) if all(p in found for found in places)]
        for body, found in zip(bodies, places, strict=True):
            for position in shared:
                self.vertex[body[found[position]]] = position
            self.single += [n for n in body if n not in self.vertex]
        called: set[int] = set()
        for position in shared:
            nodes = [body[found[position]] for body, found in zip(bodies, places, strict=True)]
            if len({_module_or_statistics(n) for n in nodes}) > 1:
                called.add(position)
                self.modules += nodes
        for node, position in self._first_iteration(template, set(shared)):
            self.vertex[node] = position
            if position in called:
                self.modules.insert(0, node)
        for body in self.run.bodies:
            for node in body:
                self.vertex.setdefault(node, node)

    def _first_iteration(self, template: list[Hashable], shared: set[int]) -> Iterator[tuple[Node, int]]:
        """The nodes of the first iteration that have a place in the later ones."""
        first = self.run.bodies[0]
        for position, index in matched_places(template, [self._key(n) for n in first]).items():
            if position in shared:
                yield first[index], position

    def _key(self, node: Node) -> Hashable:
        """The operation of a node and its line; modules of one class are alike."""
        kind, target = operation(node)
        if kind == "call_module":
            target = type(self.program.resolve(str(target)))
        return kind, target, WHERE.of(node)

    def recurs_apart(self) -> bool:
        """Whether values other than a sum pass from iteration to iteration beside the nodes that stand apart."""
        apart = {self.vertex[n] for n in (*self.modules, *self.single)}
        cycles = [c for c in nx.strongly_connected_components(self._dependences()) if len(c) > 1]
        return bool(cycles) and not any(apart & cycle for cycle in cycles)

    def _dependences(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        for node, vertex in self.vertex.items():
            graph.add_node(vertex)
            graph.add_edges_from((self.vertex[n], vertex) for n in node.all_input_nodes if n in self.vertex)
        return graph

    def levels(self) -> dict[Node, int] | Node:
        """The number of nodes outside the loops that each node depends on; a recurrent one of them if it has no end."""
        apart = {self.vertex[n]: n for n in (*self.modules, *self.single)}
        graph = self._dependences()
        found: dict[Hashable, int] = {}
        condensed = nx.condensation(graph)
        for component in nx.topological_sort(condensed):
            members = condensed.nodes[component]["members"]
            recurs = len(members) > 1 or any(graph.has_edge(v, v) for v in members)
            for vertex in members:
                if vertex in apart and recurs:
                    return apart[vertex]
            before = (v for member in members for v in graph.predecessors(member) if v not in members)
            level = max((found[v] + (v in apart) for v in before), default=0)
            found.update(dict.fromkeys(members, level))
        return {node: found[vertex] for node, vertex in self.vertex.items()}


def _module_or_statistics(node: Node) -> tuple[str, ...]:
    """The module that a node calls, or the running statistics that a norm function updates."""
    if node.op == "call_module":
        return (str(node.target),)
    return tuple(str(n.target) for n in statistics_of_function(node))


def matched_places(template: list[Hashable], keys: list[Hashable]) -> dict[int, int]:
    """The places of a template in a list, in order."""
    if template == keys:
        return {i: i for i in range(len(keys))}
    matcher = difflib.SequenceMatcher(None, template, keys, autojunk=False)
    return {block.a + i: block.b + i for block in matcher.get_matching_blocks() for i in range(block.size)}
