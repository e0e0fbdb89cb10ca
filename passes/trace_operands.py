"""Take weight gradients on the eligibility trace of the operand.

Replaces `y = op(operand, W)` by

    a' = leak * a + operand            # a: a new state slot, "fc1.trace", 0 before the first step
    y  = traced op(operand, a', W)     # the value of op(operand, W); dy/dW uses a', dy/d(operand) does not change

The operand is the direct input of the weight op, after any pooling, dropout, sum or concatenation, so the rule holds
for any graph. `leak` is the leak of the neuron that the weight feeds: for a linear leak, the trace is exactly the
derivative of the membrane potential with respect to the weight over all earlier steps. If each neuron has a leak of its
own, there is a trace for each output channel, a new dimension of the operand (`snnfx.analysis.trace_leaks`). A weight
that feeds no neuron has no trace, as no state depends on it.
Source: Xiao et al. 2022, eq. 9; Bellec et al. 2020, eq. 22.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.dependence import analyse_dependence, ancestors
from snnfx.analysis.leak import LeakProbe
from snnfx.analysis.step_on_numbers import is_elementwise
from snnfx.analysis.trace_leaks import TraceLeak, TraceLeaks, is_added_by_rule
from snnfx.analysis.weight_ops import WeightOp, groups_of, output_channels_of, weight_ops
from snnfx.errors import InputError, warn_once
from snnfx.ir.edits import add_slot
from snnfx.ir.facts import SLOT, TRACE, VALUE
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import (
    ones_per_sample,
    probe_leak,
    traced_call,
    traced_module,
    update_trace,
)
from snnfx.ops.step_functions import FunctionHolder
from snnfx.passes.base import Pass

__all__ = [
    "TraceOperands",
]


Leak = float | Node


@dataclass(frozen=True)
class TraceOperands(Pass):
    """Take weight gradients on the trace of the operand.

    Args:
        leak: "post": the leak of the neuron that the weight feeds; "pre": of the neuron that emits the operand; or a
            number.
        inputs: also trace weights whose operand depends on the network's input only.
        biases: take the gradients of biases on the trace of 1.
    """

    name = "trace_operands"
    requires = "normalized"
    ensures = "normalized"
    may_change = ("graph", "slots")

    leak: Literal["post", "pre"] | float = "post"
    inputs: bool = False
    biases: bool = False

    def apply(self, program: StepProgram) -> str:
        if program.first_step is not None:
            raise InputError(
                "SNNFX616",
                "the weights of this model cannot have traces",
                why="the graph of its first step differs from the later steps (SNNFX212).",
                hint="Use a rule without traces, or run the same operations at every step.",
            )
        dependence = analyse_dependence(program)
        ops = weight_ops(program, dependence)
        self._warn_of_other_weights(program, {op.node for op in ops})
        leaks = TraceLeaks(program, self.leak, ops)
        found = [(op, self._leak_of(op, leaks)) for op in ops]
        for op, leak in found:
            text = f"no trace: {leak}" if isinstance(leak, str) else f"a trace with {leak}"
            TRACE.set(op.node, f"{describe_node(op.node)}: {text}")
        left = [f"{describe_node(op.node)} ({leak})" for op, leak in found if isinstance(leak, str)]
        nodes = _LeakNodes(program, leaks)
        for op, leak in found:
            if isinstance(leak, TraceLeak):
                self._trace(program, op, leak, nodes)
        note = f"{len(found) - len(left)} of {len(ops)} weights see a trace"
        return f"{note}; not {', '.join(left)}" if left else note

    def _leak_of(self, op: WeightOp, leaks: TraceLeaks) -> TraceLeak | str:
        if not self.inputs and not _depends_on_state(op.operand):
            return "it is on the network's input; trace_inputs=True gives it a trace"
        return leaks.of(op)

    def _warn_of_other_weights(self, program: StepProgram, known: set[Node]) -> None:
        """Warn of weights (matrices or larger) in operations that support no trace."""
        for node in program.graph.nodes:
            if not node.op.startswith("call") or node in known or not (self.inputs or _depends_on_state(node)):
                continue
            module = program.module_of(node)
            if module is None:
                given = [program.resolve(str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
                parameters = [] if is_elementwise(program, node) else given
            else:
                parameters = list(module.parameters())
            if any(isinstance(p, nn.Parameter) and p.requires_grad and p.dim() > 1 for p in parameters):
                warn_once(
                    "SNNFX618",
                    f"the weights of `{describe_node(node)}` have no eligibility trace: only linear layers, "
                    "convolutions and products with a weight support one. Their gradient covers the current step only.",
                    key=(id(program.source), describe_node(node)),
                )

    def _trace(self, program: StepProgram, op: WeightOp, leak: TraceLeak, leaks: _LeakNodes) -> None:
        graph, node, operand = program.graph, op.node, op.operand
        name = str(node.target) if node.op == "call_module" else node.name
        value = leaks.node(leak.source)
        with graph.inserting_before(node):
            traced = operand if leak.channel is None else _for_each_channel(program, op, operand, leak.channel)
            aligned = value if leak.channel is None else _reshaped(graph, value, -1, *(1,) * -leak.channel)
        trace = add_slot(program, f"{name}.trace", traced)
        slots, first = [trace], [0.0]
        with graph.inserting_before(node):
            following = [graph.call_function(update_trace, (trace, traced, aligned))]
        following[0].meta = {k: v for k, v in traced.meta.items() if k == "val"} | _site(node)
        _set_value_per_channel(node, leak.channel, (trace, following[0]))
        bias_trace = None
        if self.biases and _has_bias(program, op):
            bias_slot = add_slot(program, f"{name}.bias_trace", node)
            VALUE.clear(bias_slot)
            with graph.inserting_before(node):
                ones = graph.call_function(ones_per_sample, (operand,))
                new = [ones]
                if leak.channel is not None:
                    new.append(graph.call_function(torch.unsqueeze, (ones, -1)))
                own = value if leak.channel is None else _reshaped(graph, value, -1)
                bias_trace = graph.call_function(update_trace, (bias_slot, new[-1], own))
            for made in (*new, bias_trace):
                made.meta = _site(node)
            slots.append(bias_slot)
            following.append(bias_trace)
            first.append(0.0)
        with graph.inserting_before(node):
            if op.position is None:
                module = graph.get_attr(str(node.target))
                call = graph.call_function(traced_module, (module, operand, following[0], bias_trace), name=node.name)
            else:
                function = _function_name(program, node)
                arguments = (function, op.position, following[0], bias_trace, *node.args)
                call = graph.call_function(traced_call, arguments, dict(node.kwargs), name=node.name)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        program.set_output(program.outputs, (*program.next_states, *following), (*program.initial_values, *first))


def _for_each_channel(program: StepProgram, op: WeightOp, operand: Node, channel: int) -> Node:
    """The operand with a dimension for the output channels, of size 1: it broadcasts with the leaks.

    A linear layer has `[N, *, 1, in]`, and a convolution `[N, 1, in, *]`. A convolution with groups has
    `[N, out, in / groups, *]`: each output channel has the inputs of its group only.
    """
    graph = program.graph
    groups = groups_of(program, op.node)
    new: list[Node] = []
    if groups == 1:
        new.append(graph.call_function(torch.unsqueeze, (operand, channel - 1)))
    else:
        out = output_channels_of(program, op.node)
        new.append(graph.call_function(torch.unflatten, (operand, 1, (groups, -1))))
        new.append(graph.call_function(torch.repeat_interleave, (new[-1], out // groups), {"dim": 1}))
    value = VALUE.of(operand)
    for made in new:
        made.meta = _site(op.node)
        if isinstance(value, Tensor):
            value = made.target(value, *made.args[1:], **made.kwargs)  # type: ignore[operator]
            VALUE.set(made, value)
    return new[-1]


def _set_value_per_channel(node: Node, channel: int | None, traces: Sequence[Node]) -> None:
    """Record the shape of a trace for each output channel, which bounds the chunks by its memory."""
    output, value = VALUE.of(node), VALUE.of(traces[0])
    if channel is None or not isinstance(output, Tensor) or not isinstance(value, Tensor):
        return
    shape = list(value.shape)
    shape[channel - 1] = output.shape[channel]
    for trace in traces:
        VALUE.set(trace, value.expand(shape))


def _reshaped(graph: fx.Graph, value: Leak, *shape: int) -> Leak:
    if not isinstance(value, Node):
        return value
    return graph.call_function(torch.reshape, (value, shape))


def _site(node: Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k in ("where", "module")}


def _has_bias(program: StepProgram, op: WeightOp) -> bool:
    if op.position is None:
        return getattr(program.resolve(str(op.node.target)), "bias", None) is not None
    found = find_rule(op.node, program.resolve)
    return found is not None and isinstance(found.arguments.get("bias", op.node.kwargs.get("bias")), Node)


def _function_name(program: StepProgram, node: Node) -> str:
    found = find_rule(node, program.resolve)
    assert found is not None
    return found.name


def _depends_on_state(operand: Node) -> bool:
    """Whether a value depends on the state of a neuron; masks and traces added by rules do not count."""
    return any(n.op == "placeholder" and SLOT.is_known(n) and not is_added_by_rule(n) for n in ancestors([operand]))


class _LeakNodes:
    """The leaks as arguments of `update_trace`: a number, or a node that measures the leak."""

    def __init__(self, program: StepProgram, leaks: TraceLeaks) -> None:
        self.program, self.leaks = program, leaks
        self.nodes: dict[str, Node] = {}

    def node(self, leak: float | LeakProbe) -> Leak:
        if not isinstance(leak, LeakProbe):
            return leak
        if all(isinstance(self.program.resolve(target), FunctionHolder) for target in leak.targets):
            return self.leaks.number(leak)  # depends on numbers in the graph only
        if leak.slot not in self.nodes:
            program, graph = self.program, self.program.graph
            mode = "training" if program.training else "evaluation"
            name = f"leak_of_{leak.slot.replace('.', '_')}_in_{mode}"
            program.constants[name] = leak
            first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
            with graph.inserting_before(first):
                own = graph.get_attr(name)
                constants = [_attribute(program, target, first) for target in leak.targets]
                node = graph.call_function(probe_leak, (own, *constants))
            VALUE.set(node, self.leaks.measured[leak.slot] if leak.per_neuron else 0.5)
            self.nodes[leak.slot] = node
        return self.nodes[leak.slot]


def _attribute(program: StepProgram, target: str, before: Node) -> Node:
    """The get_attr node of a target, moved or created before another node."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == target:
            before.prepend(node)
            found: Node = node
            return found
    made: Node = program.graph.get_attr(target)
    return made
