"""Replace calls of an emitted graph by segments that are recomputed in the backward pass.

`conv -> statistics -> (norm, neurons, pool)` becomes one call that saves its inputs for backward (spikes as bits)
instead of every intermediate. Legal because regions are functional: their state is a value, and
`snnfx.recompute.recomputation` replays any other effect. A segment is convex: only the values of its last tile are
read outside.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx import Node, map_arg

from snnfx.analysis.integer_ranges import IntegerRanges
from snnfx.emit.tiling import STATISTICS, name_of_call
from snnfx.ir.facts import IS_PRODUCT, STEP_NODE
from snnfx.recompute.packed_saved_tensors import PackedInputs, run_tile_with_packed_inputs
from snnfx.recompute.recomputation import run_segment
from snnfx.recompute.segment import Segment, StatisticsCall, TileCall
from snnfx.recompute.tile import Slices, Tile, run_tile

__all__ = ["RecomputePlan", "recompute_segments", "region_calls", "segments_of"]


@dataclass(frozen=True)
class RecomputePlan:
    """The parts of a net that are recomputed in the backward pass.

    Args:
        segments: the groups of calls that are recomputed together, by name in execution order: products and statistics,
            and last a tile.
        slices: the slices in which a group is recomputed, by the name of its tile.
        twice: names of the tiles whose products are recomputed twice in backward, slice by slice, so that their whole
            results are never allocated.
        packs: whether products save sequences of integers packed.
        steps: time steps between checkpoints of the state of the whole net; None: no such checkpoints. A plan with
            checkpoints has no segments.
        reason: one line for `explain`.
    """

    segments: tuple[tuple[str, ...], ...] = ()
    slices: Mapping[str, Slices] = field(default_factory=dict)
    twice: frozenset[str] = frozenset()
    packs: bool = False
    steps: int | None = None
    reason: str = ""


def region_calls(graph: fx.Graph) -> dict[str, Node]:
    """The calls of an emitted graph that run regions, parts or tiles over time, by name."""
    named = ((name_of_call(node), node) for node in graph.nodes)
    return {name: node for name, node in named if name is not None}


def segments_of(graph: fx.Graph, tiles: Mapping[str, Tile]) -> dict[str, tuple[list[str], list[str]]]:
    """For each tile except products, the products and statistics that only this tile reads, in graph order."""
    calls = region_calls(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    readers = {name: _readers(node) for name, node in calls.items()}
    random_calls = [calls[name] for name, tile in tiles.items() if tile.is_random]
    segments = {}
    for name in tiles:
        tile = calls[name]
        if _is_product(tile):
            continue
        statistics = [n for n, node in calls.items() if node.target in STATISTICS and readers[n] == {tile}]
        inside = {tile, *(calls[n] for n in statistics)}
        products = [n for n, node in calls.items() if _is_product(node) and readers[n] and readers[n] <= inside]
        # Moving a product to the tile must not change the order in which random numbers are drawn.
        fixed = {
            n
            for n in products
            if tiles[n].is_random and any(order[calls[n]] < order[call] < order[tile] for call in random_calls)
        }
        segments[name] = ([n for n in products if n not in fixed], statistics)
    return segments


def _is_product(node: Node) -> bool:
    return bool(IS_PRODUCT.of(node))


def _readers(call: Node) -> set[Node]:
    """The nodes that read the values of a call."""
    elements = _elements_of(call)
    return {user for node in (call, *elements) for user in node.users} - set(elements)


def recompute_segments(
    graph: fx.Graph,
    tiles: Mapping[str, Tile],
    plan: RecomputePlan,
    container: str,
    program_nodes: Mapping[str, Node],
    integer_ranges: IntegerRanges,
) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The graph with the segments of a plan, and the modules of the segments by name.

    Args:
        graph: a graph made by `group_tiles`; it is not changed.
        tiles: the tiles that the graph runs, by name.
        plan: the plan with the segments.
        container: the attribute path under which the net stores the modules.
        program_nodes: the nodes of the step, by name.
        integer_ranges: the integer-valued nodes of the step, whose sequences may be saved packed.
    """
    return _SegmentEmitter(graph, tiles, container, program_nodes, integer_ranges).emit(plan)


class _SegmentEmitter:
    def __init__(
        self,
        graph: fx.Graph,
        tiles: Mapping[str, Tile],
        container: str,
        program_nodes: Mapping[str, Node],
        integer_ranges: IntegerRanges,
    ) -> None:
        self.graph, self.tiles, self.container = graph, tiles, container
        self.program_nodes, self.integer_ranges = program_nodes, integer_ranges
        self.calls = region_calls(graph)
        self.new = fx.Graph()
        self.env: dict[Node, Any] = {}
        self.modules: dict[str, nn.Module] = {}

    def emit(self, plan: RecomputePlan) -> tuple[fx.Graph, dict[str, nn.Module]]:
        inner = {self.calls[name] for group in plan.segments for name in group[:-1]}
        inner |= {n for call in inner for n in _elements_of(call)}
        last = {self.calls[group[-1]]: group for group in plan.segments}
        for node in self.graph.nodes:
            if node in inner:
                continue
            if node.target in STATISTICS:
                # No segment recomputes this BatchNorm: without statistics, `normalize` calls the module directly.
                self.env.update(dict.fromkeys([node, *_elements_of(node)]))
                continue
            if node in self.env:
                continue
            if node in last:
                self.env[node] = self._segment(last[node], plan)
            elif plan.packs and node.target is run_tile and (bounds := self._bounds(node)):
                self.env[node] = self._packed(node, bounds)
            else:
                self.env[node] = self.new.node_copy(node, self.env.__getitem__)
            self.env[node].meta = dict(node.meta)
        return self.new, self.modules

    def _largest(self, node: Any) -> int:
        """The largest integer in the sequence of a node; 0: the sequence is not known to be integer-valued."""
        step = self.program_nodes.get(STEP_NODE.of(node)) if isinstance(node, Node) else None
        return self.integer_ranges.largest.get(step, 0) if step is not None else 0

    def _bounds(self, call: Node) -> tuple[int, ...]:
        if not _is_product(call):
            return ()
        bounds = tuple(self._largest(n) for n in call.args[1])  # type: ignore[union-attr]
        return bounds if any(bounds) else ()

    def _module(self, name: str, module: nn.Module) -> Node:
        self.modules[name] = module
        return self.new.get_attr(f"{self.container}.{name}")

    def _packed(self, call: Node, bounds: tuple[int, ...]) -> Node:
        name = f"packed_{len(self.modules)}"
        holder = self._module(name, PackedInputs(bounds, self.integer_ranges.holds))
        args = map_arg(call.args, self.env.__getitem__)
        return self.new.call_function(run_tile_with_packed_inputs, (holder, *args), name=call.name)

    def _segment(self, group: tuple[str, ...], plan: RecomputePlan) -> Node:
        calls = [self.calls[name] for name in group]
        numbers: dict[Any, int] = {}
        operands: list[Any] = []
        inside = {n for call in calls for n in (call, *_elements_of(call))}

        def number(value: Any) -> int:
            if value not in numbers:
                assert value not in inside
                numbers[value] = len(operands)
                operands.append(value)
            return numbers[value]

        for call in calls:
            for value in call.all_input_nodes:
                if value not in inside and not (call.target is run_tile and value is call.args[0]):
                    number(value)
        count = len(operands)
        for call in calls[:-1]:
            for element in _values_of(call):
                numbers[element] = count
                count += 1
        products, statistics, tile = [], [], None
        for name, call in zip(group, calls, strict=True):
            if call.target in STATISTICS:
                x, module = call.args
                made = {n.args[1]: numbers[n] for n in call.users}
                for index in range(2):
                    if index not in made:
                        made[index], count = count, count + 1
                statistics.append(StatisticsCall(call.target, numbers[x], numbers[module], (made[0], made[1])))
                continue
            _, sequences, states, constants = call.args
            tile = TileCall(
                self.tiles[name],
                tuple(numbers[n] for n in sequences),  # type: ignore[union-attr]
                tuple(numbers[s] if isinstance(s, Node) else s for s in states),  # type: ignore[union-attr]
                tuple(numbers[n] for n in constants),  # type: ignore[union-attr]
                self._makes(call, numbers)
                if call is not calls[-1]
                else tuple(range(count, count + _outputs(self.tiles[name]))),
            )
            if call is not calls[-1]:
                products.append(tile)
        assert tile is not None
        name = f"segment_{len(self.modules)}"
        segment = Segment(
            ", ".join(group),
            products,
            statistics,
            tile,
            plan.slices.get(group[-1], Slices()),
            group[-1] in plan.twice,
            {numbers[n]: self._largest(n) for n in operands if isinstance(n, Node) and self._largest(n)},
            self.integer_ranges.holds,
        )
        module = self._module(name, segment)
        values = tuple(self.env[n] for n in operands)
        return self.new.call_function(run_segment, (module, values), name=name)

    def _makes(self, call: Node, numbers: Mapping[Any, int]) -> tuple[int, ...]:
        """The numbers of the sequences that a product returns; a segment reads each of them."""
        by_index = {n.args[1]: numbers[n] for n in _values_of(call)}
        return tuple(by_index[i] for i in range(len(by_index)))


def _elements_of(call: Node) -> list[Node]:
    """The nodes that take elements from the tuples that a call returns."""
    elements: list[Node] = []
    if call.target in STATISTICS:
        return [n for n in call.users if n.target is operator.getitem]
    for part in call.users:
        if part.target is operator.getitem:
            elements += [part, *(n for n in part.users if n.target is operator.getitem)]
    return elements


def _values_of(call: Node) -> list[Node]:
    """The nodes of the sequences, or of the statistics, that a call returns."""
    if call.target in STATISTICS:
        return _elements_of(call)
    return [n for part in call.users if part.args[1] == 0 for n in part.users if n.target is operator.getitem]


def _outputs(tile: Tile) -> int:
    sequences: Any = tile.graph.output_node().args[0]
    return len(sequences[0])
