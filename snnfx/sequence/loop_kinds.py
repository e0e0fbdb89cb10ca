"""Tell loops over time from loops over layers, heads and scales, in a call of fixed length.

A loop over time hands values from one iteration to the next, and each of its iterations reads one element of a sequence
or the same static input. A loop over layers calls another module in each iteration.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from snnfx.ir.nodes import is_module_call
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.step_functions import apply_autograd_function
from snnfx.sequence.element_reads import common_read
from snnfx.sequence.fission import calls_modules_beside_states
from snnfx.sequence.loop_runs import LoopRun

__all__ = ["is_over_layers", "must_be_one_step", "runs_neurons", "runs_over_time"]

_FEWEST = 3
"""Iterations that prove a step: one may start differently, and two are compared."""


def runs_over_time(program: StepProgram, runs: list[LoopRun]) -> Iterator[LoopRun]:
    """The loops to re-roll: the outermost ones, or inner ones if an outer one cannot be a loop over time."""
    for run in runs:
        if run.count >= _FEWEST and _may_be_over_time(program, run):
            yield run
        else:
            for inner in run.inner:
                yield from runs_over_time(program, inner)


def _may_be_over_time(program: StepProgram, run: LoopRun) -> bool:
    if _carries(run):
        if not is_over_layers(run):
            return True
        inner = (r for runs in run.inner for r in runs)
        return not any(map(_carries_below, inner)) and calls_modules_beside_states(program, run)
    # Heads, or a layer that runs step by step: neurons inside them come first.
    return _reads_elements(run) and not any(_carries_below(r) for inner in run.inner for r in inner)


def is_over_layers(run: LoopRun) -> bool:
    """Whether each iteration calls other modules, on values that are no elements of one sequence."""
    called = {frozenset(n.meta.get("module", "") for n in body) for body in run.bodies[1:]}
    return len(called) > 1 and not _reads_elements(run)


def must_be_one_step(run: LoopRun) -> bool:
    """Whether a loop must run the same step in each iteration; others stay in the graph of the call."""
    return _carries(run) and (_reads_elements(run) or not (is_over_layers(run) or _reads_own_attributes(run)))


def runs_neurons(run: LoopRun) -> bool:
    """Whether a loop compares values or calls neurons; other loops have no kernel to gain."""
    nodes = run.bodies[-1]
    return any(
        is_module_call(n) or n.target is apply_autograd_function or operation_name(n) in _COMPARISONS for n in nodes
    )


_COMPARISONS = frozenset("gt ge lt le heaviside".split())


def _carries_below(run: LoopRun) -> bool:
    inner = (r for runs in run.inner for r in runs)
    return (run.count >= _FEWEST and _carries(run)) or any(map(_carries_below, inner))


def _carries(run: LoopRun) -> bool:
    """Whether an iteration reads a value of an earlier one."""
    iteration_of = {node: i for i, body in enumerate(run.bodies) for node in body}
    return any(iteration_of.get(n, i) < i for node, i in iteration_of.items() for n in node.all_input_nodes)


def _reads_elements(run: LoopRun) -> bool:
    """Whether the iterations read consecutive elements of one value from outside the loop."""
    inside = {node for body in run.bodies for node in body}
    reads = [_reads_from_outside(body, inside) for body in run.bodies[1:]]
    common = set(reads[0]).intersection(*reads[1:])
    return len(reads) > 1 and any(
        common_read(list(nodes)) is not None
        for source in common
        for nodes in zip(*(r[source] for r in reads), strict=False)
    )


def _reads_from_outside(body: list[Node], inside: set[Node]) -> dict[Node, list[Node]]:
    """The nodes that select a part of a value from outside the loop, by this value."""
    found: dict[Node, list[Node]] = {}
    for node in dict.fromkeys(n for reader in body for n in (reader, *reader.all_input_nodes)):
        source = node.args[0] if node.args and node.op in ("call_function", "call_method") else None
        if isinstance(source, Node) and source not in inside and (node in inside or node.op == "call_function"):
            found.setdefault(source, []).append(node)
    return found


def _reads_own_attributes(run: LoopRun) -> bool:
    """Whether each iteration reads other parameters or buffers."""
    read = {
        frozenset(n.target for node in body for n in node.all_input_nodes if n.op == "get_attr")
        for body in run.bodies[1:]
    }
    return len(read) > 1
