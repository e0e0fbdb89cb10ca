"""Split a loop at the nodes that its iterations do not share: norms of each step, a readout in the last iteration.

`self.norms[t](x)` calls another module in each iteration, and `if t == T - 1: ...` runs code in one iteration only. If
no later iteration depends on such a node through a state, the node can run outside the loop: the loop becomes several
loops one behind another, and the nodes in between stay in the graph of the call, with the modules of the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import networkx as nx
from torch.fx import Node

from snnfx.ir.facts import WHERE
from snnfx.ir.module_effects import statistics_of_function, updated_buffers, updates_buffers
from snnfx.ir.nodes import is_size
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.sequence.loop_runs import LoopRun
from snnfx.sequence.roles import operation

__all__ = ["LoopParts", "calls_modules_beside_states", "split_loop"]


@dataclass
class LoopParts:
    """The parts of a loop.

    Args:
        runs: the loops of the common nodes, in execution order.
        modules: the nodes between them that call another module in each iteration.
        single: the nodes between them that only some iterations run.
        blocked: a node that the iterations do not share and that must stay inside: a later one of them depends on it,
            or updates the same buffers before or after other nodes of the loop. The loop then has no parts.
        why: the reason, with `blocked`.
    """

    runs: list[LoopRun] = field(default_factory=list)
    modules: list[Node] = field(default_factory=list)
    single: list[Node] = field(default_factory=list)
    blocked: Node | None = None
    why: str = ""


def split_loop(program: StepProgram, run: LoopRun) -> LoopParts | None:
    """Order the nodes of a loop so that those which its iterations do not share stand between loops.

    Args:
        program: the program of the call; its nodes are reordered.
        run: the loop.

    Returns:
        The parts; None if the iterations share all nodes.
    """
    vertices = _Vertices(program, run)
    if not vertices.modules and not vertices.single:
        return None
    levels = vertices.levels()
    if isinstance(levels, Node):
        return vertices.blocked(levels, "which later iterations depend on through a state")
    apart = {*vertices.modules, *vertices.single}
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    inside = [node for body in run.bodies for node in body]
    inside.sort(key=lambda n: (levels[n], n in apart, order[n]))
    moved = _first_moved_update(program, run, inside)
    if moved is not None:
        return vertices.blocked(moved, "whose buffers other operations of the loop update in turn")
    front = run.bodies[0][0].prev
    for node in reversed(inside):
        front.append(node)
    runs = []
    for level in range(max(levels.values()) + 1):
        bodies = [[n for n in body if n not in apart and levels[n] == level] for body in run.bodies]
        if bodies and not bodies[0]:
            bodies = bodies[1:]
        if any(not _is_read(n) for body in bodies for n in body):
            runs.append(LoopRun(run.source, bodies, [[] for _ in bodies]))
    return LoopParts(runs, vertices.modules, vertices.single)


def calls_modules_beside_states(program: StepProgram, run: LoopRun) -> bool:
    """Whether iterations that call different modules pass on states that do not go through these modules.

    A loop over layers passes the result of each layer to the next one.
    """
    vertices = _Vertices(program, run)
    return bool(vertices.modules or vertices.single) and vertices.recurs_apart()


def _first_moved_update(program: StepProgram, run: LoopRun, ordered: list[Node]) -> Node | None:
    """The first node that would update its buffers at another turn in this order."""
    updates = {n: updated_buffers(program, n) for n in ordered if updates_buffers(program, n)}
    later: dict[int, list[Node]] = {}
    for node in (n for body in run.bodies for n in body if n in updates):
        for buffer in updates[node]:
            later.setdefault(id(buffer), []).append(node)
    for node, buffers in ((n, updates[n]) for n in ordered if n in updates):
        for buffer in buffers:
            if later[id(buffer)].pop(0) is not node:
                return node
    return None


def _is_read(node: Node) -> bool:
    """Whether a node reads an element or a size, which costs nothing outside a loop."""
    return is_size(node) or operation_name(node) in ("getitem", "select")


class _Vertices:
    """The nodes of a loop, with those at one place of the iterations joined to one vertex."""

    def __init__(self, program: StepProgram, run: LoopRun) -> None:
        self.program, self.run = program, run
        self.vertex: dict[Node, Hashable] = {}
        self.modules: list[Node] = []
        """Nodes that call another module in each iteration."""
        self.single: list[Node] = []
        """Nodes that only some of the iterations behind the first run."""
        self._match()

    def _match(self) -> None:
        bodies = self.run.bodies[1:]
        keys = [[self._key(n) for n in body] for body in bodies]
        template = min(keys, key=len) if keys else []
        places = [_matched(template, k) for k in keys]
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
        for position, index in _matched(template, [self._key(n) for n in first]).items():
            if position in shared:
                yield first[index], position

    def _key(self, node: Node) -> Hashable:
        """The operation of a node and its line; modules of one class are alike."""
        kind, target = operation(node)
        if kind == "call_module":
            target = type(self.program.resolve(str(target)))
        return kind, target, WHERE.of(node)

    def blocked(self, node: Node, why: str) -> LoopParts:
        """The result for a loop that a node keeps together."""
        return LoopParts(modules=self.modules, single=self.single, blocked=node, why=why)

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


def _matched(template: list[Hashable], keys: list[Hashable]) -> dict[int, int]:
    """The places of a template in a list, in order."""
    if template == keys:
        return {i: i for i in range(len(keys))}
    matcher = difflib.SequenceMatcher(None, template, keys, autojunk=False)
    return {block.a + i: block.b + i for block in matcher.get_matching_blocks() for i in range(block.size)}
