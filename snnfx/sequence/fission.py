"""Split a loop at the nodes that its iterations do not share: norms of each step, a readout in the last iteration.

`self.norms[t](x)` calls another module in each iteration, and `if t == T - 1: ...` runs code in one iteration only. If
no later iteration depends on such a node through a state, the node can run outside the loop: the loop becomes several
loops one behind another, and the nodes in between stay in the graph of the call, with the modules of the user.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from snnfx.ir.module_effects import updated_buffers, updates_buffers
from snnfx.ir.nodes import is_size
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.sequence.loop_runs import LoopRun
from snnfx.sequence.shared_nodes import SharedNodes

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
        The parts; None if the iterations share all nodes, or none.
    """
    shared = SharedNodes(program, run)
    if not shared.modules and not shared.single:
        return None
    levels = shared.levels()
    if isinstance(levels, Node):
        return _blocked(shared, levels, "which later iterations depend on through a state")
    apart = {*shared.modules, *shared.single}
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    inside = [node for body in run.bodies for node in body]
    inside.sort(key=lambda n: (levels[n], n in apart, order[n]))
    moved = _first_moved_update(program, run, inside)
    if moved is not None:
        return _blocked(shared, moved, "whose buffers other operations of the loop update in turn")
    runs = []
    for level in range(max(levels.values()) + 1):
        bodies = [[n for n in body if n not in apart and levels[n] == level] for body in run.bodies]
        if bodies and not bodies[0]:
            bodies = bodies[1:]
        if any(not _is_read(n) for body in bodies[1:] for n in body):
            runs.append(LoopRun(run.source, bodies, [[] for _ in bodies]))
    if not runs and not shared.modules:
        return None  # the iterations have nothing in common
    front = run.bodies[0][0].prev
    for node in reversed(inside):
        front.append(node)
    return LoopParts(runs, shared.modules, shared.single)


def _blocked(shared: SharedNodes, node: Node, why: str) -> LoopParts:
    return LoopParts(modules=shared.modules, single=shared.single, blocked=node, why=why)


def calls_modules_beside_states(program: StepProgram, run: LoopRun) -> bool:
    """Whether iterations that call different modules pass on states that do not go through these modules.

    A loop over layers passes the result of each layer to the next one.
    """
    shared = SharedNodes(program, run)
    return bool(shared.modules or shared.single) and shared.recurs_apart()


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
