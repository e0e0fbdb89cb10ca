"""Group calls of an emitted graph into tiles (loop fusion).

`norm -> loop -> pool` becomes one call, which can run slice by slice. A tile is a connected group of light calls (cheap
to recompute) between products; each product is a tile of its own. A tile is convex: nodes are numbered in layers, with
a new layer wherever a path changes between light and other nodes, and the calls of a tile share one layer.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx import Node, map_arg

from snnfx.analysis.statistic_reads import is_statistic_read
from snnfx.emit.compiled_graph import compile_graph
from snnfx.emit.fold_parts import LIGHT, NORM, PRODUCT, FoldPart
from snnfx.functional import map_forward, multi_step_forward, seq_to_ann_forward
from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import BATCH_DIM, REGION_NAME, STEP_NODE
from snnfx.ir.program import StepProgram
from snnfx.recompute.batch_statistics import batch_statistics, normalize, step_statistics
from snnfx.recompute.tile import Tile, run_tile

__all__ = ["STATISTICS", "group_tiles", "name_of_call"]

STATISTICS = (batch_statistics, step_statistics)
_OVER_TIME = (seq_to_ann_forward, map_forward, multi_step_forward)


def name_of_call(node: Node) -> str | None:
    """The name of the region, part or tile that a node runs over time; None for any other node."""
    if node.op != "call_function":
        return None
    if node.target in (*STATISTICS, normalize, run_tile):
        return str(REGION_NAME.of(node))
    return str(node.args[1].target).rpartition(".")[2] if node.target in _OVER_TIME else None  # type: ignore[union-attr]


@dataclass
class _Call:
    """A call of a tile: its operands, and the elements taken from its result."""

    node: Node
    part: FoldPart
    elements: dict[Node, None] = field(default_factory=dict)

    @property
    def sequences(self) -> tuple[Node, ...]:
        if self.node.target is not normalize:
            return tuple(self.node.args[0])  # type: ignore[arg-type]
        count = 3 if self.is_per_step else 1
        return tuple(self.node.args[:count])  # type: ignore[arg-type]

    @property
    def is_per_step(self) -> bool:
        """Whether the call normalises with the statistics of each time step."""
        return self.node.target is normalize and self.part.region.kind == "map"

    @property
    def finals(self) -> list[Node]:
        """The nodes that take the final states of a loop from its result."""
        return [n for n in self.elements if _is_loop(self.node) and n.args == (self.node, 1)]

    @property
    def values(self) -> list[Node]:
        """The nodes of the sequences that the call returns."""
        if self.node.target is normalize:
            return [self.node]
        return [n for n in self.elements if not (_is_loop(self.node) and n.args[0] is self.node)]


def _is_loop(node: Node) -> bool:
    return node.target is multi_step_forward


def group_tiles(
    program: StepProgram, graph: fx.Graph, parts: Sequence[FoldPart], container: str
) -> tuple[fx.Graph, dict[str, Tile]]:
    """The graph with its calls grouped into tiles, and the tiles by name.

    Args:
        program: the program that the graph was emitted from.
        graph: a graph made by `emit_parts`; it is not changed.
        parts: the parts that the graph runs.
        container: the attribute path under which the net stores the tiles.
    """
    return _TileEmitter(program, graph, {part.region.name: part for part in parts}, container).emit()


class _TileEmitter:
    def __init__(self, program: StepProgram, graph: fx.Graph, parts: Mapping[str, FoldPart], container: str) -> None:
        self.program, self.graph, self.parts, self.container = program, graph, parts, container
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.steps = program.nodes_by_name
        self.calls: dict[Node, _Call] = {}
        self.call_of: dict[Node, _Call] = {}
        for node in graph.nodes:
            part = parts.get(name_of_call(node) or "")
            if part is not None and part.role and node.target not in STATISTICS:
                elements = sorted(_elements(node), key=self.position.__getitem__)
                self.calls[node] = self.call_of[node] = _Call(node, part, dict.fromkeys(elements))
                self.call_of.update(dict.fromkeys(self.calls[node].elements, self.calls[node]))
        self.predecessors = self._effect_predecessors()
        self.layer: dict[Node, int] = {}
        for node in graph.nodes:
            self._assign_layer(node)
        self.groups = self._group_calls()

    def _is_light(self, node: Node) -> bool:
        call = self.call_of.get(node)
        return call is not None and call.part.role in (LIGHT, NORM)

    def _effect_predecessors(self) -> dict[Node, list[Node]]:
        """For each call with an effect, the last call before with the same effect.

        Effects are random numbers, updates of running statistics, and reads of updated statistics. The order of these
        calls must not change.
        """
        predecessors: dict[Node, list[Node]] = {}
        last: dict[Any, Node] = {}
        reads = [node for node in self.graph.nodes if is_statistic_read(node)]
        for node in self.graph.nodes:
            call = self.calls.get(node)
            keys: list[Any] = ["rng"] if call is not None and call.part.is_random else []
            keys += [node.args[1]] if node.target in STATISTICS else []
            keys += [("read", read.args[0]) for read in reads if read is node or _calls_owner(node, read)]
            for key in dict.fromkeys(keys):
                if key in last:
                    predecessors.setdefault(node, []).append(last[key])
                last[key] = node
        return predecessors

    def _assign_layer(self, node: Node) -> None:
        light = self._is_light(node)
        operands = [*node.all_input_nodes, *self.predecessors.get(node, ())]
        self.layer[node] = max((self.layer[n] + (self._is_light(n) != light) for n in operands), default=0)

    def _group_calls(self) -> list[list[_Call]]:
        parent: dict[Node, Node] = {node: node for node in self.calls}

        def find(node: Node) -> Node:
            while parent[node] is not node:
                node = parent[node]
            return node

        for node, call in self.calls.items():
            if call.part.role == PRODUCT:
                continue
            for operand in call.sequences:
                producer = self.call_of.get(operand)
                if producer is None or not self._is_light(producer.node):
                    continue
                if self.layer[producer.node] == self.layer[node]:
                    parent[find(node)] = find(producer.node)
        groups: dict[Node, list[_Call]] = {}
        for node, call in self.calls.items():
            groups.setdefault(find(node), []).append(call)
        return list(groups.values())

    # -- the new graph ----------------------------------------------------------------------------------------------

    def emit(self) -> tuple[fx.Graph, dict[str, Tile]]:
        """The graph and its tiles by name."""
        group_of = {n: group for group in self.groups for call in group for n in (call.node, *call.elements)}
        new = fx.Graph()
        env: dict[Node, Node] = {}
        tiles: dict[str, Tile] = {}
        for unit in self._in_order(group_of):
            if isinstance(unit, Node):
                env[unit] = new.node_copy(unit, env.__getitem__)
                env[unit].meta = dict(unit.meta)
            else:
                name = _name(unit)
                tiles[name] = self._emit_tile(unit, name, new, env)
        return new, tiles

    def _in_order(self, group_of: Mapping[Node, list[_Call]]) -> Iterable[Node | list[_Call]]:
        """Nodes and groups in topological order, and otherwise in the order of the graph."""
        key_of = {n: id(group_of[n]) if n in group_of else id(n) for n in self.graph.nodes}
        units: dict[int, Node | list[_Call]] = {}
        needs: dict[int, set[int]] = {}
        users: dict[int, set[int]] = {}
        place: dict[int, int] = {}
        for node in self.graph.nodes:
            key = key_of[node]
            units.setdefault(key, group_of.get(node, node))
            # A group has the position of its last call.
            place[key] = self.position[node] if node not in group_of or node in self.calls else place.get(key, 0)
            operands = [*node.all_input_nodes, *self.predecessors.get(node, ())]
            needs.setdefault(key, set()).update(k for k in map(key_of.__getitem__, operands) if k != key)
        for key, needed in needs.items():
            for k in needed:
                users.setdefault(k, set()).add(key)
        missing = {key: len(needed) for key, needed in needs.items()}
        ready = [(place[key], key) for key, count in missing.items() if count == 0]
        heapq.heapify(ready)
        while ready:
            _, key = heapq.heappop(ready)
            yield units[key]
            for user in users.get(key, ()):
                missing[user] -= 1
                if missing[user] == 0:
                    heapq.heappush(ready, (place[user], user))

    def _emit_tile(self, group: list[_Call], name: str, new: fx.Graph, env: dict[Node, Node]) -> Tile:
        inside = {n for call in group for n in (call.node, *call.elements)}
        sequences: dict[Node, bool] = {}
        states: list[Any] = []
        constants: dict[Node, None] = {}
        for call in group:
            batched = call.sequences[:1] if call.node.target is normalize else call.sequences
            for n in call.sequences:
                if n not in inside:
                    sequences[n] = sequences.get(n, False) or n in batched
            state = call.node.kwargs.get("state")
            states += [state] if _is_loop(call.node) else []
            rest = [n for n in call.node.all_input_nodes if n not in call.sequences and n is not state]
            constants.update(dict.fromkeys(rest))
        constants = {n: None for n in constants if n not in sequences}
        values = [v for call in group for v in call.values if any(user not in inside for user in v.users)]
        finals = [call.finals for call in group if _is_loop(call.node)]
        body = fx.Graph()
        copies = {n: add_placeholder(body, n.name) for n in sequences}
        initial_states = iter([add_placeholder(body, f"state_{index}") for index in range(len(states))])
        copies.update({n: add_placeholder(body, n.name) for n in constants})
        final_states = []
        for call in group:
            state_argument = {"state": next(initial_states)} if _is_loop(call.node) else {}
            copied = _copy_call(body, call.node, copies, state_argument)
            for n in call.elements:
                copies[n] = body.node_copy(n, copies.__getitem__)
                copies[n].meta = dict(n.meta)
            final_states += [body.call_function(operator.getitem, (copied, 1))] if state_argument else []
        body.output((tuple(copies[v] for v in values), tuple(final_states)))
        attribute = new.get_attr(f"{self.container}.{name}")
        arguments: Any = map_arg((tuple(sequences), tuple(states), tuple(constants)), env.__getitem__)
        tile_call = new.call_function(run_tile, (attribute, *arguments), name=name)
        tile_call.meta.update(region_name=name, is_product=group[0].part.role == PRODUCT)
        for index, aliases in enumerate(([[v] for v in values], finals)):
            results = new.call_function(operator.getitem, (tile_call, index)) if any(aliases) else tile_call
            for position, nodes in enumerate(aliases):
                if not nodes:
                    continue
                element = new.call_function(operator.getitem, (results, position))
                element.meta = dict(nodes[0].meta)
                env.update(dict.fromkeys(nodes, element))
        return self._make_tile(group, body, list(sequences.items()), values, list(constants))

    def _make_tile(
        self,
        group: list[_Call],
        body: fx.Graph,
        sequences: list[tuple[Node, bool]],
        values: list[Node],
        constants: list[Node],
    ) -> Tile:
        members = [call.part for call in group]
        is_product = members[0].role == PRODUCT
        inputs_and_outputs = [*(n for n, batched in sequences if batched), *values]
        return Tile(
            ", ".join(part.region.name for part in members),
            body,
            compile_graph(body),
            [batched for _, batched in sequences],
            by_steps=all(part.by_steps or part.role == NORM for part in members),
            by_samples=all(part.by_samples or part.role == NORM for part in members)
            and all(map(self._is_batch_first, inputs_and_outputs))
            and not any(self._is_batched_constant(n) for n in constants),
            is_random=is_product and members[0].is_random,
        )

    def _is_batch_first(self, node: Node) -> bool:
        """Whether the batch is the outermost part of the first dimension of one step of a value."""
        step = self.steps.get(STEP_NODE.of(node), node)
        return bool(BATCH_DIM.of(step) == 0)

    def _is_batched_constant(self, node: Node) -> bool:
        """Whether a value that is the same at all time steps may differ between samples."""
        is_statistic = any(n.target in STATISTICS for n in (node, *node.all_input_nodes))
        if node.op == "get_attr" or is_statistic:
            return False
        step = self.steps.get(STEP_NODE.of(node), node)
        return not BATCH_DIM.is_known(step) or BATCH_DIM.of(step) is not None


def _calls_owner(node: Node, read: Node) -> bool:
    """Whether a node calls the module with the statistic that a read returns, or a module that contains it."""
    owner = f"{read.args[0].target}."  # type: ignore[union-attr]
    return any(n.op == "get_attr" and owner.startswith(f"{n.target}.") for n in node.all_input_nodes)


def _copy_call(body: fx.Graph, node: Node, copies: dict[Node, Node], replaced: dict[str, Any]) -> Node:
    """Copy a call into `body`, with some keyword arguments replaced."""
    copied = {k: v for k, v in node.kwargs.items() if k not in replaced}
    args, kwargs = map_arg((node.args, copied), copies.__getitem__)
    copies[node] = body.create_node(node.op, node.target, args, {**kwargs, **replaced}, name=node.name)
    copies[node].meta = dict(node.meta)
    return copies[node]


def _name(group: list[_Call]) -> str:
    """The name of the first loop in a group, or else of its first part."""
    names = [call.part.region.name for call in group]
    return next((call.part.region.name for call in group if _is_loop(call.node)), names[0])


def _elements(call: Node) -> Iterable[Node]:
    """The nodes that take elements from the tuple that a call returns."""
    if call.target is normalize:
        return []
    elements = [user for user in call.users if user.target is operator.getitem]
    if _is_loop(call):
        for outputs in [n for n in elements if n.args[1] == 0]:
            elements += [user for user in outputs.users if user.target is operator.getitem]
    return elements
