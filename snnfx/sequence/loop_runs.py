"""The runs of Python loops in a captured call: which nodes each iteration recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.capture.iteration_tracking import LoopSource
from snnfx.ir.facts import ITERATIONS
from snnfx.ir.program import StepProgram
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import format_location

__all__ = ["LoopRun", "find_loop_runs", "move_attributes_first", "scaling_runs", "share_equal_constants"]


@dataclass
class LoopRun:
    """One run of a loop.

    Args:
        source: the loop in the user's code.
        bodies: the nodes of each iteration, in program order.
        inner: the runs of loops inside each iteration.
    """

    source: LoopSource
    bodies: list[list[Node]] = field(default_factory=list)
    inner: list[list[LoopRun]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of iterations."""
        return len(self.bodies)

    @property
    def location(self) -> str:
        """The user's file and line; the name of a library module that no code of the user calls."""
        source = self.source
        return format_location(source.where) or f"`{source.function}`"


def move_attributes_first(program: StepProgram) -> str:
    """Move the get_attr nodes in front of all calls: capture records them where they are first read; return a note."""
    graph = program.graph
    moved = [node for node in graph.nodes if node.op == "get_attr"]
    first = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), graph.output_node())
    for node in moved:
        ITERATIONS.clear(node)
        first.prepend(node)
    return f"moved {len(moved)} reads of attributes"


def share_equal_constants(program: StepProgram) -> str:
    """Share tensors with equal values that the code makes in each iteration: `torch.tensor(...)`; return a note."""
    known: list[tuple[Tensor, Node]] = []
    # The user may change a tensor of the model later.
    of_model = {id(leaf) for m in program.source.modules() for leaf in pytree.tree_leaves(vars(m))}
    shared = 0
    for node in [n for n in program.graph.nodes if n.op == "get_attr" and str(n.target) in program.constants]:
        value = program.constants[str(node.target)]
        if not isinstance(value, Tensor) or value.requires_grad or id(value) in of_model:
            continue
        first = next((n for x, n in known if x is not value and _are_equal(x, value)), None)
        if first is None:
            known.append((value, node))
            continue
        node.replace_all_uses_with(first)
        program.graph.erase_node(node)
        shared += 1
    return f"shared {shared} constants"


def _are_equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    # 0.0 equals -0.0, but 1 / 0.0 does not equal 1 / -0.0.
    return a.stride() == b.stride() and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def find_loop_runs(graph: fx.Graph) -> list[LoopRun]:
    """The runs of the outermost loops that recorded nodes, in program order."""
    outermost: list[LoopRun] = []
    known: dict[int, LoopRun] = {}
    for node in graph.nodes:
        siblings = outermost
        for iteration in ITERATIONS.of(node):
            run = known.get(iteration.run)
            if run is None:
                run = known[iteration.run] = LoopRun(iteration.source)
                siblings.append(run)
            while run.count <= iteration.index:
                run.bodies.append([])
                run.inner.append([])
            run.bodies[iteration.index].append(node)
            siblings = run.inner[iteration.index]
    for run in known.values():
        while run.bodies and not run.bodies[-1]:  # the test that ends the loop
            run.bodies.pop()
            run.inner.pop()
    return outermost


def scaling_runs(short: list[LoopRun], long: list[LoopRun]) -> list[tuple[LoopRun, LoopRun]] | None:
    """The outermost runs that iterate more often in the longer of two calls; None if the calls differ otherwise.

    Args:
        short, long: the runs of two calls of one model, the second with one more time step.
    """
    if [run.source for run in short] != [run.source for run in long]:
        return None
    found: list[tuple[LoopRun, LoopRun]] = []
    for a, b in zip(short, long, strict=True):
        if a.count != b.count:
            found.append((a, b))
            continue
        for inner_a, inner_b in zip(a.inner, b.inner, strict=True):
            inner = scaling_runs(inner_a, inner_b)
            if inner is None:
                return None
            found += inner
    return found
