"""Prove that a call computes each time step apart from the others, but for its loops.

This is the batch analysis with the time dimension as the batch: `f(cat_t x_t) == cat_t f(x_t)` for every operation
outside the loops. At the end, the call may reduce over time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.analysis.batch.equivariance import BatchAnalysis, infer_batch
from snnfx.analysis.batch.facts import NON_TENSOR, Fact, NonTensor, Rank, SizeFact, leaves
from snnfx.analysis.dependence import is_random
from snnfx.errors import Refusal
from snnfx.ir.facts import SLOT, VALUE
from snnfx.ir.module_effects import updates_buffers
from snnfx.ir.nodes import is_size
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.run_loop import run_loop
from snnfx.ops.step_functions import expect_size
from snnfx.sequence.reason_at_node import ReasonAtNode
from snnfx.state.step_calls import call_opaque, call_stateful, initial_value, opaque_initial_value

__all__ = ["MixesTime", "PointwiseTime", "TimeDimension", "length_nodes", "prove_pointwise"]

TIME = "T"


@dataclass(frozen=True)
class TimeDimension:
    """The dimension `dim` of some tensors among the inputs, by index, of size `size` in the capture."""

    leaves: tuple[int, ...]
    dim: int
    size: int = 0


class MixesTime(ReasonAtNode):
    """A call computes with several time steps at once outside its loops."""


@dataclass
class PointwiseTime:
    """A call that is pointwise in time.

    Args:
        facts: node -> where its time dimension is.
        relevant: the nodes that the outputs depend on, in program order.
        time_dim: the time dimension of the outputs; that of the inputs if the call reduces over time.
        reduce: "mean", "sum" or "last" if the call reduces over time at its end.
        reductions: the operations that reduce.
        behind: the operations behind them.
    """

    facts: dict[Node, Any]
    relevant: list[Node]
    time_dim: int
    reduce: str | None = None
    reductions: set[Node] = field(default_factory=set)
    behind: set[Node] = field(default_factory=set)


def prove_pointwise(program: StepProgram, time: TimeDimension, varying_of: dict[str, list[bool]]) -> PointwiseTime:
    """Prove that a call is pointwise in time but for its loops and a reduction at its end.

    Args:
        program: the call, with re-rolled loops.
        time: the time dimension of its inputs.
        varying_of: for the target of each loop, which of its inputs are sequences.

    Raises:
        MixesTime: it is not.
    """
    relevant = _relevant(program)
    analysis = _analysis(program, time)
    reductions = {n: kind for n in relevant if (kind := _reduction(n, analysis))}
    behind = _behind(set(reductions), relevant)
    for node in relevant:
        if node not in behind and node not in reductions:
            _check(program, node, analysis, varying_of)
    for node in relevant:
        if node in behind:
            _check_behind(program, node, behind | reductions.keys(), analysis, set(reductions.values()))
    outputs = [o for o in program.outputs if isinstance(o, Node)]
    reduced = [o for o in outputs if o in behind or o in reductions]
    if not outputs:
        raise MixesTime("no output of the call is a tensor")
    if reduced:
        if len(reduced) < len(outputs):
            raise MixesTime("some outputs have a time dimension and others are reduced over time", reduced[0])
        if len(set(reductions.values())) > 1:
            raise MixesTime("the outputs are reduced over time in different ways", reduced[-1])
        kind = next(iter(reductions.values()))
        return PointwiseTime(analysis.facts, relevant, time.dim, kind, set(reductions), behind)
    dims = set()
    for output in outputs:
        fact = analysis.facts.get(output)
        if not isinstance(fact, Fact) or fact.size != TIME:
            raise MixesTime(f"the output `{output.name}` has no time dimension", output)
        dims.add(fact.dim)
    if dims != {time.dim}:
        raise MixesTime("the inputs and outputs have their time in different dimensions", outputs[0])
    return PointwiseTime(analysis.facts, relevant, time.dim)


def _relevant(program: StepProgram) -> list[Node]:
    """The nodes that the outputs depend on, and the checks of sizes."""
    found: set[Node] = set()
    checks = [n for n in program.graph.nodes if n.target is expect_size]
    stack = [*checks, *(o for o in program.outputs if isinstance(o, Node))]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return [n for n in program.graph.nodes if n in found or (updates_buffers(program, n) and n.op != "output")]


def _analysis(program: StepProgram, time: TimeDimension) -> BatchAnalysis:
    inputs: dict[Node, Fact | NonTensor] = {}
    for index, node in enumerate(program.input_nodes()):
        value = VALUE.of(node)
        if index not in time.leaves or not isinstance(value, Tensor):
            raise MixesTime(f"the input `{node.name}` has no time dimension", node)
        inputs[node] = Fact(Rank(value.dim()), time.dim, TIME)
    varying = _varying(program, inputs)
    # Only loops may read the states (see `_check`).
    inputs.update(dict.fromkeys(program.slot_nodes(), NON_TENSOR))
    return infer_batch(
        program.graph,
        program.resolve,
        inputs,
        carried={},
        varying=varying,
        training=program.training,
        batch_norm="fold",
        training_of=program.is_in_training,
        unit=(TIME, time.size),
    )


def length_nodes(program: StepProgram, time: TimeDimension) -> set[Node]:
    """The sizes in a call that are the number of time steps.

    Raises:
        MixesTime: an input has no time dimension.
    """
    facts = _analysis(program, time).facts
    return {n for n, fact in facts.items() if isinstance(fact, SizeFact) and fact.symbol == TIME}


def _varying(program: StepProgram, inputs: Iterable[Node]) -> set[Node]:
    found = set(inputs)
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if any(n in found for n in node.all_input_nodes) or (node.op.startswith("call") and is_random(program, node)):
            found.add(node)
    return found


def _reduction(node: Node, analysis: BatchAnalysis) -> str | None:
    """The kind of a reduction over time: "mean", "sum" or "last"."""
    if node not in analysis.refusals or not node.args or not isinstance(node.args[0], Node):
        return None
    fact = analysis.facts.get(node.args[0])
    value = VALUE.of(node.args[0])
    if not isinstance(fact, Fact) or fact.size != TIME or not isinstance(value, Tensor):
        return None
    name, dims = operation_name(node), value.dim()
    if name in ("mean", "sum"):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        is_plain = len(node.args) <= 2 and node.kwargs.keys() <= {"dim"}
        return name if is_plain and isinstance(dim, int) and dim % dims == fact.dim else None
    if name == "select" and not node.kwargs and len(node.args) == 3:
        dim, index = node.args[1:]
        return "last" if isinstance(dim, int) and dim % dims == fact.dim and index == -1 else None
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        leading = all(isinstance(i, slice) and i == slice(None) for i in index[:-1])
        return "last" if leading and len(index) - 1 == fact.dim and index[-1:] == (-1,) else None
    return None


def _behind(reductions: set[Node], relevant: list[Node]) -> set[Node]:
    found: set[Node] = set()
    for node in relevant:
        if any(n in found or n in reductions for n in node.all_input_nodes):
            found.add(node)
    return found


_OF_STATE = (call_stateful, call_opaque, initial_value, opaque_initial_value)


def _check(program: StepProgram, node: Node, analysis: BatchAnalysis, varying_of: dict[str, list[bool]]) -> None:
    if node.target in _OF_STATE or (
        node.target is not run_loop and any(SLOT.is_known(n) for n in node.all_input_nodes)
    ):
        raise MixesTime(f"{describe_node(node)} runs on all time steps at once", node)
    if node.target is run_loop:
        _check_loop(program, node, analysis, varying_of)
    refusal = analysis.refusals.get(node)
    if refusal is not None:
        raise MixesTime(_in_time(refusal), node)


def _check_loop(program: StepProgram, node: Node, analysis: BatchAnalysis, varying_of: dict[str, list[bool]]) -> None:
    handle, _, values, state = node.args
    assert isinstance(handle, Node) and isinstance(values, tuple | list) and isinstance(state, dict)
    for value, varies in zip(values, varying_of[str(handle.target)], strict=True):
        fact = analysis.facts.get(value)
        is_sequence = isinstance(fact, Fact) and fact.batched
        if varies and not is_sequence:
            raise MixesTime(f"the loop reads element t of `{value.name}`, which belongs to no input", node)
        if is_sequence and not varies:
            raise MixesTime(f"the loop reads all time steps of `{value.name}` in each iteration", node)
    slots = program.slot_nodes()
    for value in state.values():
        if value not in slots:
            raise MixesTime("the loop starts from a state that an earlier loop leaves", node)


def _check_behind(
    program: StepProgram, node: Node, reduced: set[Node], analysis: BatchAnalysis, kinds: set[str]
) -> None:
    """An operation behind a reduction reads reduced values, and values and sizes that do not depend on time."""
    if node.target is run_loop or node.target in _OF_STATE:
        raise MixesTime(f"{describe_node(node)} reads a value that is reduced over time", node)
    if kinds == {"sum"} and not is_size(node) and not _scales(node):
        raise MixesTime(f"{describe_node(node)} reads a sum over time", node)
    if updates_buffers(program, node) or is_random(program, node):
        raise MixesTime(f"{describe_node(node)} runs once for all time steps", node)
    for operand in node.all_input_nodes:
        if operand in reduced:
            continue
        for fact in leaves(analysis.facts.get(operand)):
            varies = isinstance(fact, Fact) and (fact.batched or fact.varying)
            if varies or (isinstance(fact, SizeFact) and fact.symbol is not None):
                raise MixesTime(f"{describe_node(node)} combines a value of each time step with a reduced one", node)


def _scales(node: Node) -> bool:
    """Whether a node multiplies a tensor by a number, so that the sum of the results is the result of the sum."""
    name, numbers = operation_name(node), [a for a in node.args if isinstance(a, int | float)]
    if name not in ("mul", "truediv", "div") or len(node.args) != 2 or node.kwargs or len(numbers) != 1:
        return name == "neg" and not node.kwargs
    return name == "mul" or node.args[1] is numbers[0]


def _in_time(refusal: Refusal) -> str:
    """The reason of a refusal in terms of time."""
    reason = refusal.reason.replace("the batch dimension", "the time dimension")
    return reason.replace("the batch size", "the number of time steps").replace("batch", "time")
