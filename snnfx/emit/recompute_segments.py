"""Replace calls of an emitted graph by segments that are computed again in the backward pass.

`conv -> statistics -> (norm, neurons, pool)` becomes one call that keeps what enters it (spikes in bits) instead of
everything inside. Legal because regions are functional: their state is a value, and what else a second run could see is
replayed by `snnfx.recompute.recomputation`. A segment is convex: only its last tile is read outside.
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
from snnfx.recompute.packed_saved_tensors import PackedInputs, run_tile_with_packed_inputs
from snnfx.recompute.recomputation import run_segment
from snnfx.recompute.segment import Segment, StatisticsCall, TileCall
from snnfx.recompute.tile import Slices, Tile, run_tile

__all__ = ["RecomputePlan", "recompute_segments", "region_calls", "segments_of"]


@dataclass(frozen=True)
class RecomputePlan:
    """What is computed again in the backward pass.

    Args:
        segments: names of what is computed again together, each group in the order in which it runs: products and
            statistics, and last a tile.
        slices: how the sequences in a group are cut, by the name of its tile.
        twice: names of the tiles whose products are computed two times in backward, so that they are never there as a
            whole.
        packs: whether products keep sequences of whole numbers packed.
        steps: time steps at once for the net as a whole, whose state is kept at the borders; None: all of them. Then
            there are no segments.
        reason: one line for `explain`.
    """

    segments: tuple[tuple[str, ...], ...] = ()
    slices: Mapping[str, Slices] = field(default_factory=dict)
    twice: frozenset[str] = frozenset()
    packs: bool = False
    steps: int | None = None
    reason: str = ""


def region_calls(graph: fx.Graph) -> dict[str, Node]:
    """The calls of an emitted graph that run something over time, by name."""
    named = ((name_of_call(node), node) for node in graph.nodes)
    return {name: node for name, node in named if name is not None}


def segments_of(graph: fx.Graph, tiles: Mapping[str, Tile]) -> dict[str, tuple[list[str], list[str]]]:
    """For each tile that is no product, the products and statistics that only it needs, in the order of the graph."""
    calls = region_calls(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    readers = {name: _readers(node) for name, node in calls.items()}
    dice = [calls[name] for name, tile in tiles.items() if tile.is_random]
    found = {}
    for name in tiles:
        tile = calls[name]
        if _is_product(tile):
            continue
        statistics = [n for n, node in calls.items() if node.target in STATISTICS and readers[n] == {tile}]
        inside = {tile, *(calls[n] for n in statistics)}
        products = [n for n, node in calls.items() if _is_product(node) and readers[n] and readers[n] <= inside]
        # Moving a product to the tile must not change the order in which numbers are drawn.
        late = {
            n for n in products if tiles[n].is_random and any(order[calls[n]] < order[d] < order[tile] for d in dice)
        }
        found[name] = ([n for n in products if n not in late], statistics)
    return found


def _is_product(node: Node) -> bool:
    return bool(node.meta.get("is_product"))


def _readers(call: Node) -> set[Node]:
    """Who reads what a call returns."""
    taken = _taken_from(call)
    return {user for node in (call, *taken) for user in node.users} - set(taken)


def recompute_segments(
    graph: fx.Graph,
    tiles: Mapping[str, Tile],
    plan: RecomputePlan,
    container: str,
    program_nodes: Mapping[str, Node],
    whole: IntegerRanges,
) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The graph with the segments of a plan, and the modules of these by name.

    Args:
        graph: of `passes.tiles`; it is not changed.
        tiles: that it runs.
        plan: its segments.
        container: where the net will keep the modules.
        program_nodes: nodes of the step, by name.
        whole: what may be kept packed.
    """
    return _Segments(graph, tiles, container, program_nodes, whole).result(plan)


class _Segments:
    def __init__(
        self,
        graph: fx.Graph,
        tiles: Mapping[str, Tile],
        container: str,
        program_nodes: Mapping[str, Node],
        whole: IntegerRanges,
    ) -> None:
        self.graph, self.tiles, self.container = graph, tiles, container
        self.program_nodes, self.whole = program_nodes, whole
        self.calls = region_calls(graph)
        self.new = fx.Graph()
        self.env: dict[Node, Any] = {}
        self.modules: dict[str, nn.Module] = {}

    def result(self, plan: RecomputePlan) -> tuple[fx.Graph, dict[str, nn.Module]]:
        inner = {self.calls[name] for group in plan.segments for name in group[:-1]}
        inner |= {n for call in inner for n in _taken_from(call)}
        last = {self.calls[group[-1]]: group for group in plan.segments}
        for node in self.graph.nodes:
            if node in inner:
                continue
            if node.target in STATISTICS:
                # Nothing is computed again: the module is called as it is.
                self.env.update(dict.fromkeys([node, *_taken_from(node)]))
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
        """The largest whole number in a sequence, 0 where it is not known to hold any."""
        step = self.program_nodes.get(node.meta.get("step_node", "")) if isinstance(node, Node) else None
        return self.whole.largest.get(step, 0) if step is not None else 0

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
        holder = self._module(name, PackedInputs(bounds, self.whole.holds))
        args = map_arg(call.args, self.env.__getitem__)
        return self.new.call_function(run_tile_with_packed_inputs, (holder, *args), name=call.name)

    def _segment(self, group: tuple[str, ...], plan: RecomputePlan) -> Node:
        calls = [self.calls[name] for name in group]
        numbers: dict[Any, int] = {}
        given: list[Any] = []
        inside = {n for call in calls for n in (call, *_taken_from(call))}

        def number(value: Any) -> int:
            if value not in numbers:
                assert value not in inside
                numbers[value] = len(given)
                given.append(value)
            return numbers[value]

        for call in calls:
            for value in call.all_input_nodes:
                if value not in inside and not (call.target is run_tile and value is call.args[0]):
                    number(value)
        count = len(given)
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
            {numbers[n]: self._largest(n) for n in given if isinstance(n, Node) and self._largest(n)},
            self.whole.holds,
        )
        module = self._module(name, segment)
        values = tuple(self.env[n] for n in given)
        return self.new.call_function(run_segment, (module, values), name=name)

    def _makes(self, call: Node, numbers: Mapping[Any, int]) -> tuple[int, ...]:
        """The numbers of all sequences that a product makes; every one of them is read."""
        by_index = {n.args[1]: numbers[n] for n in _values_of(call)}
        return tuple(by_index[i] for i in range(len(by_index)))


def _taken_from(call: Node) -> list[Node]:
    """What is taken from the result of a call: elements of tuples."""
    found: list[Node] = []
    if call.target in STATISTICS:
        return [n for n in call.users if n.target is operator.getitem]
    for part in call.users:
        if part.target is operator.getitem:
            found += [part, *(n for n in part.users if n.target is operator.getitem)]
    return found


def _values_of(call: Node) -> list[Node]:
    """The sequences, or the statistics, that a call makes."""
    if call.target in STATISTICS:
        return _taken_from(call)
    return [n for part in call.users if part.args[1] == 0 for n in part.users if n.target is operator.getitem]


def _outputs(tile: Tile) -> int:
    sequences: Any = tile.graph.output_node().args[0]
    return len(sequences[0])
