"""Let all iterations detach a state under a condition of each step: `if t % k == 0: mem = mem.detach()`.

Detaching does not change a value, only its gradient. So `where(flag, x.detach(), x)` with a constant flag for each step
is what the iterations with and without `detach` compute.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import ITERATIONS, VALUE, WHERE
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.sequence.element_reads import record_call
from snnfx.sequence.loop_runs import LoopRun
from snnfx.sequence.shared_nodes import SharedNodes

__all__ = ["gate_detaches"]


@dataclass
class _Detaches:
    """The `detach` calls of one value at one place of the code.

    Args:
        source: the vertex of the value.
        of_next: whether an iteration detaches the value of the previous one.
        nodes: the calls, by the iteration that computes the value.
        readers: `(iterations later, vertex)` of the nodes that read the detached value.
        outside: whether code outside the loop reads it.
    """

    source: Hashable
    of_next: bool
    nodes: dict[int, Node] = field(default_factory=dict)
    readers: set[tuple[int, Hashable]] = field(default_factory=set)
    outside: bool = False


def gate_detaches(program: StepProgram, run: LoopRun) -> bool:
    """Replace the calls of `detach` that only some iterations run; return whether there are any.

    Args:
        program: the program of the call.
        run: the loop; its iterations get the new nodes.
    """
    shared = SharedNodes(program, run)
    iteration_of = {n: i for i, body in enumerate(run.bodies) for n in body}
    groups: dict[Hashable, _Detaches] = {}
    for node in shared.single:
        if operation_name(node) != "detach":
            continue
        x = node.args[0]
        if not isinstance(x, Node) or x not in iteration_of or shared.vertex[x] is x:
            continue
        delay = iteration_of[node] - iteration_of[x]
        if delay not in (0, 1):
            continue
        source = shared.vertex[x]
        group = groups.setdefault((WHERE.of(node), delay, source), _Detaches(source, delay == 1))
        group.nodes[iteration_of[x]] = node
        for user in node.users:
            if user in iteration_of:
                group.readers.add((iteration_of[user] - iteration_of[x], shared.vertex[user]))
            else:
                group.outside = True
    for group in groups.values():
        _gate(program, run, shared, iteration_of, group)
    return bool(groups)


def _gate(
    program: StepProgram, run: LoopRun, shared: SharedNodes, iteration_of: dict[Node, int], group: _Detaches
) -> None:
    graph = program.graph
    values = {i: n for i, body in enumerate(run.bodies) for n in body if shared.vertex[n] == group.source}
    if any(values.get(i) is not node.args[0] for i, node in group.nodes.items()):
        return  # an earlier group gates the value
    flags = torch.tensor([i in group.nodes for i in range(run.count)])
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        constant = graph.get_attr(program.constant(flags))
    VALUE.set(constant, flags)
    for i, x in values.items():
        readers = [u for u in x.users if u in iteration_of and (iteration_of[u] - i, shared.vertex[u]) in group.readers]
        outside = [u for u in x.users if u not in iteration_of]
        added = _add_gate(program, run.bodies[i], x, constant, i)
        iteration_of.update(dict.fromkeys(added, i))
        shared.vertex.update((n, n) for n in added)
        gated = added[-1]
        detached = group.nodes.get(i)
        if detached is not None:
            detached.replace_all_uses_with(gated)
            run.bodies[iteration_of[detached]].remove(detached)
            graph.erase_node(detached)
            continue
        # Without its flag a gate changes nothing, so readers may read it to be like those of other iterations.
        for user in readers + (outside if group.outside else []):
            user.replace_input_with(x, gated)


def _add_gate(program: StepProgram, body: list[Node], x: Node, flags: Node, index: int) -> tuple[Node, Node, Node]:
    """Record `where(flags[index], x.detach(), x)` behind a value of an iteration, and return its nodes."""
    graph, place = program.graph, body.index(x)
    with graph.inserting_after(x):
        detached = graph.call_method("detach", (x,))
    with graph.inserting_after(detached):
        flag = record_call(graph, torch.select, (flags, 0, index))
    with graph.inserting_after(flag):
        gated = graph.call_function(torch.where, (flag, detached, x))
    for node in (detached, gated):
        node.meta = {k: v for k, v in x.meta.items() if k in ("val", "where", "module")}
        value = VALUE.of(x)
        if isinstance(value, Tensor):
            VALUE.set(node, value.detach())
    for node in (detached, flag, gated):
        ITERATIONS.set(node, ITERATIONS.of(x))
    body[place + 1 : place + 1] = [detached, flag, gated]
    return detached, flag, gated
