"""Take weight gradients on the eligibility trace of the operand.

Replaces `y = op(operand, W)` by

    a' = leak * a + operand            # a: a new state slot, "fc1.trace", 0 before the first step
    y  = traced op(operand, a', W)     # the value of op(operand, W); dy/dW uses a', dy/d(operand) does not change

The operand is the direct input of the weight op, after any pooling, dropout, sum or concatenation, so the rule holds
for any graph. `leak` is the leak of the neuron that the weight feeds: for a linear leak, the trace is exactly the
derivative of the membrane potential with respect to the weight over all earlier steps. A weight that feeds no neuron
has no trace, as no state depends on it.
Source: Xiao et al. 2022, eq. 9; Bellec et al. 2020, eq. 22.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.fx import Node

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.dependence import analyse_dependence, ancestors
from snnfx.analysis.leak import LeakProbe, StepOnNumbers, fed_slots, is_elementwise, several_leaks_error
from snnfx.analysis.weight_ops import WeightOp, weight_ops
from snnfx.errors import InputError, warn_once
from snnfx.ir.edits import add_slot
from snnfx.ir.facts import ADDED_BY_RULE, SLOT, VALUE
from snnfx.ir.nodes import is_module_call
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import (
    cut_history,
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
        leaks = _Leaks(program, self.leak, ops)
        traced, left = 0, []
        plans: list[tuple[WeightOp, float | LeakProbe]] = []
        for op in ops:
            if not self.inputs and not _depends_on_state(op.operand):
                left.append(f"{describe_node(op.node)} (network input)")
                continue
            leak = leaks.of(op)
            if leak is None:
                left.append(f"{describe_node(op.node)} (feeds no leaking state whose gradients through time are cut)")
            else:
                plans.append((op, leak))
        for op, leak in plans:
            self._trace(program, op, leaks.node(leak))
            traced += 1
        note = f"{traced} of {len(ops)} weights see a trace"
        return f"{note}; not {', '.join(left)}" if left else note

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

    def _trace(self, program: StepProgram, op: WeightOp, leak: Leak) -> None:
        graph, node, operand = program.graph, op.node, op.operand
        name = str(node.target) if node.op == "call_module" else node.name
        trace = add_slot(program, f"{name}.trace", operand)
        slots, first = [trace], [0.0]
        with graph.inserting_before(node):
            following = [graph.call_function(update_trace, (trace, operand, leak))]
        following[0].meta = {k: v for k, v in operand.meta.items() if k == "val"} | _site(node)
        bias_trace = None
        if self.biases and _has_bias(program, op):
            bias_slot = add_slot(program, f"{name}.bias_trace", node)
            VALUE.clear(bias_slot)
            with graph.inserting_before(node):
                ones = graph.call_function(ones_per_sample, (operand,))
                bias_trace = graph.call_function(update_trace, (bias_slot, ones, leak))
            for new in (ones, bias_trace):
                new.meta = _site(node)
            slots.append(bias_slot)
            following.append(bias_trace)
            first.append(0.0)
        with graph.inserting_before(node):
            if op.position is None:
                module = graph.get_attr(str(node.target))
                new = graph.call_function(traced_module, (module, operand, following[0], bias_trace), name=node.name)
            else:
                function = _function_name(program, node)
                arguments = (function, op.position, following[0], bias_trace, *node.args)
                new = graph.call_function(traced_call, arguments, dict(node.kwargs), name=node.name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        program.set_output(program.outputs, (*program.next_states, *following), (*program.initial_values, *first))


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
    return any(n.op == "placeholder" and SLOT.is_known(n) and not _is_added_by_rule(n) for n in ancestors([operand]))


def _is_added_by_rule(node: Node) -> bool:
    return bool(ADDED_BY_RULE.of(node))


class _Leaks:
    """The leaks of the neurons of a program, measured once for each slot."""

    def __init__(self, program: StepProgram, leak: Literal["post", "pre"] | float, ops: Sequence[WeightOp]) -> None:
        self.program, self.leak = program, leak
        self.weights = [(op.node, op.operand) for op in ops]
        self.step = StepOnNumbers(program) if isinstance(leak, str) else None
        self.probes: dict[str, LeakProbe] = {}
        self.nodes: dict[str, Node] = {}
        self.cycles = {n: cycle for cycle in analyse_dependence(program).cycles for n in cycle}

    def of(self, op: WeightOp) -> float | LeakProbe | None:
        """The leak for the trace of an operand; None if the weight feeds no leaking state that is cut."""
        if not isinstance(self.leak, str):
            return float(self.leak)
        if self.leak == "post":
            assert self.step is not None
            slots = fed_slots(self.step, self.program, op.node, self.weights)
        else:
            slots = self._emitting(op.operand)
            if not slots:
                raise InputError(
                    "SNNFX615",
                    f"no neuron emits the operand of `{describe_node(op.node)}`",
                    where=location_of(op.node),
                    why='trace_leak="pre" uses the leak of the neuron that emits the operand.',
                    hint="Do not trace inputs, or pass the leak as a number.",
                )
        leaking = [(slot, leak) for slot in slots if (leak := self._now(slot)) != 0.0]
        if not leaking:
            return None
        if self.leak == "post":
            cut = {slot for slot, _ in leaking if self._is_cut(slot)}
            if not cut:
                return None  # its gradients flow through time
            if len(cut) < len(leaking):
                why = "only some of the neurons that it feeds have gradients through time"
                raise several_leaks_error(describe_node(op.node), why)
        values = [leak for _, leak in leaking]
        if max(values) - min(values) > 1e-9:
            shown = ", ".join(f"{slot} {leak:g}" for slot, leak in leaking)
            raise several_leaks_error(describe_node(op.node), f"the neurons that it feeds have several leaks: {shown}")
        if len(leaking) > 1 and any(self.probes[slot].learnable for slot, _ in leaking):
            raise several_leaks_error(
                describe_node(op.node), "it feeds several neurons whose leaks are learned separately"
            )
        return self.probes[leaking[0][0]]

    def _now(self, slot: str) -> float:
        if slot not in self.probes:
            self.probes[slot] = LeakProbe(self.program, slot)
        probe = self.probes[slot]
        return float(probe(*(self.program.resolve(target) for target in probe.targets)))

    def _is_cut(self, slot: str) -> bool:
        placeholder = next(n for n in self.program.slot_nodes() if SLOT.of(n) == slot)
        return all(user.target is cut_history for user in placeholder.users if user.op != "output")

    def _emitting(self, operand: Node) -> list[str]:
        """The slots of the nearest neurons that emit a value."""
        slots: dict[str, None] = {}
        seen: set[Node] = set()
        stack = [operand]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.cycles:
                own = [n for n in self.cycles[node] if is_module_call(n)] if is_module_call(node) else None
                members = self.cycles[node] if own is None or len(own) == 1 else [node, *node.all_input_nodes]
                slots.update((SLOT.of(n), None) for n in members if SLOT.is_known(n) and not _is_added_by_rule(n))
            else:
                stack.extend(node.all_input_nodes)
        return list(slots)

    def node(self, leak: float | LeakProbe) -> Leak:
        """The leak as an argument of `update_trace`: a number, or a node that measures it."""
        if not isinstance(leak, LeakProbe):
            return leak
        if all(isinstance(self.program.resolve(target), FunctionHolder) for target in leak.targets):
            return self._now(leak.slot)  # depends on numbers in the graph only
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
            VALUE.set(node, 0.5)
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
