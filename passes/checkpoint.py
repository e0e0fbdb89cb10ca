"""Replace region calls of an emitted graph by segments that are computed again in the backward pass.

`fold_0(x) -> loop_1` becomes one call that keeps what enters it (spikes in bits) instead of everything inside. Legal
because regions are functional: their state is a value, and what else a second run could see is replayed by
`snnfx.memory.recompute`. A segment is convex: no value leaves it and comes back. A region without statistics over time
may go through its sequence in chunks, a loop with its state handed on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn
from torch.fx import Node

from snnfx.functional import map_forward, multi_step_forward, seq_to_ann_forward
from snnfx.memory.recompute import Segment, run_segment
from snnfx.passes.dependence import is_random
from snnfx.passes.whole_numbers import WholeNumbers
from snnfx.program import Region, StepProgram, add_placeholder, keeps_statistics

__all__ = ["RecomputePlan", "can_be_chunked", "recompute_segments", "region_calls"]

_REGION_CALLS = (seq_to_ann_forward, map_forward, multi_step_forward)


@dataclass(frozen=True)
class RecomputePlan:
    """What is computed again in the backward pass.

    Args:
        segments: names of regions that are computed again together, each group in the order in which it runs.
        chunks: time steps at once in a region, by name; the others take the whole sequence.
        steps: time steps at once for the net as a whole, whose state is kept at the borders; None: all of them. Then
            there are no segments.
        reason: one line for `explain`.
    """

    segments: tuple[tuple[str, ...], ...] = ()
    chunks: Mapping[str, int] = field(default_factory=dict)
    steps: int | None = None
    reason: str = ""


def region_calls(graph: fx.Graph) -> dict[str, Node]:
    """The calls of an emitted graph that run a region over time, by the name of the region."""
    calls = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _REGION_CALLS:
            calls[node.meta.get("region_name") or str(node.args[1].target).rpartition(".")[2]] = node
    return calls


def can_be_chunked(program: StepProgram, region: Region) -> bool:
    """Whether running a region on some time steps after the others is the same: no statistics over time, no dice."""
    return not any(
        is_random(program, node) or (program.training and keeps_statistics(program, node)) for node in region.nodes
    )


def recompute_segments(
    program: StepProgram,
    graph: fx.Graph,
    regions: Sequence[Region],
    plan: RecomputePlan,
    container: str,
    whole: WholeNumbers | None,
) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The emitted graph with the segments of a plan, and these segments by name.

    Args:
        program: what the graph was emitted from.
        graph: as `passes.emit` makes it, or `passes.split_statistics`; it is not changed.
        regions: what it runs.
        plan: its `segments` and `chunks`.
        container: where the net will keep the segments.
        whole: what may be kept packed; None: nothing.
    """
    calls = region_calls(graph)
    groups = [part for group in plan.segments for part in _convex(graph, [calls[name] for name in group])]
    region_of = {call: name for name, call in calls.items()}
    by_name = {region.name: region for region in regions}
    nodes_by_name = program.nodes_by_name
    new = fx.Graph()
    env: dict[Node, Node] = {}
    segments: dict[str, nn.Module] = {}
    inside = {node: group for group in groups for node in _with_elements(group)}
    for node in graph.nodes:
        group = inside.get(node)
        if group is None:
            env[node] = new.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
        elif node is group[-1]:
            name = f"segment_{len(segments)}"
            members = _with_elements(group)
            inputs = list(dict.fromkeys(n for m in members for n in m.all_input_nodes if inside.get(n) is not group))
            outputs = [m for m in members if any(inside.get(user) is not group for user in m.users)]
            body = _body(members, inputs, outputs)
            names = {source: placeholder.name for source, placeholder in zip(inputs, body.placeholders, strict=True)}
            packed = {}
            for source in inputs:
                step_node = nodes_by_name.get(source.meta.get("step_node", ""))
                if whole is not None and step_node in whole.largest:
                    packed[names[source]] = whole.largest[step_node]
            parts = [by_name[region_of[call]] for call in group]
            chunks = {
                body.calls[call].name: plan.chunks[region.name]
                for call, region in zip(group, parts, strict=True)
                if region.name in plan.chunks
            }
            dice = [c for c, r in zip(group, parts, strict=True) if any(is_random(program, n) for n in r.nodes)]
            segments[name] = Segment(
                ", ".join(region.name for region in parts),
                body.graph,
                chunks,
                packed,
                whole.holds if whole is not None else _never,
                frozenset(body.calls[call].name for call in dice),
            )
            module = new.get_attr(f"{container}.{name}")
            call = new.call_function(run_segment, (module, tuple(env[n] for n in inputs)), name=name)
            for index, output in enumerate(outputs):
                env[output] = new.call_function(operator.getitem, (call, index))
                env[output].meta.update(output.meta)
    return new, segments


def _never() -> bool:
    return False


@dataclass
class _Body:
    graph: fx.Graph
    placeholders: list[Node]
    calls: dict[Node, Node]


def _body(members: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> _Body:
    graph = fx.Graph()
    env = {node: add_placeholder(graph, node.name) for node in inputs}
    placeholders = list(env.values())
    for node in members:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    return _Body(graph, placeholders, env)


def _with_elements(group: Iterable[Node]) -> list[Node]:
    """Calls with the getitems that take their results apart, in the order of the graph."""
    found: dict[Node, None] = {}
    for call in group:
        stack = [call]
        while stack:
            node = stack.pop()
            found[node] = None
            stack.extend(u for u in node.users if u.target is operator.getitem and not _is_tensor_element(u))
    order = {node: i for i, node in enumerate(next(iter(found)).graph.nodes)}
    return sorted(found, key=order.__getitem__)


def _is_tensor_element(node: Node) -> bool:
    """Whether a getitem takes a part of a tensor, not of a tuple of results."""
    source = node.args[0]
    return isinstance(source, Node) and "step_node" in source.meta


def _convex(graph: fx.Graph, calls: list[Node]) -> list[list[Node]]:
    """The calls as one group if no value leaves it and comes back before its last call, else each by itself."""
    members = set(_with_elements(calls))
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = order[calls[-1]]
    outside = [user for node in members for user in node.users if user not in members]
    return [calls] if all(order[user] > last for user in outside) else [[call] for call in calls]
