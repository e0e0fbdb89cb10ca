"""How the layers that read spikes ran at their latest call, for `explain`, `profile` and `draw`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import EVENTS, SITE
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.lowering.events.layer_decisions import Decision, latest_decision
from snnfx.lowering.events.spike_matrices import decision_at

__all__ = ["event_decision", "event_layers"]


def event_layers(program: StepProgram) -> Iterator[str]:
    """A sentence for each layer that may run by events; nothing before the first call that decides."""
    nodes = [node for node in program.graph.nodes if EVENTS.of(node)]
    decisions = [event_decision(program, node) for node in nodes]
    if not any(decisions):
        return
    for node, decision in zip(nodes, decisions, strict=True):
        name = describe_node(node)
        if decision is None:
            yield f"`{name}` ran densely: its calls were too small or not plain."
            continue
        way = "ran by events" if decision.by_events else "ran densely"
        if not decision.is_finite:
            operand = "weight" if SITE.of(node) is None else "other operand"
            yield f"`{name}` {way}: its {operand} is not finite."
            continue
        limit = "" if decision.crossover is None else f"; events are faster below {decision.crossover:.0%}"
        density = f"{decision.density:.1%} of its inputs were not zero in a sample of the latest large call"
        yield f"`{name}` {way}: {density}{limit}."


def event_decision(program: StepProgram, node: Node) -> Decision | None:
    """How the latest call of a layer ran; None if it always runs densely, or did not decide yet."""
    site = SITE.of(node)
    if site is not None:
        return decision_at(site)
    weight = _weight_of(program, node) if EVENTS.of(node) else None
    return None if weight is None else latest_decision(weight)


def _weight_of(program: StepProgram, node: Node) -> Tensor | None:
    if node.op == "call_module":
        weight = program.resolve(str(node.target)).weight
    else:
        operand = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if not isinstance(operand, Node) or operand.op != "get_attr":
            return None
        weight = program.resolve(str(operand.target))
    return weight if isinstance(weight, Tensor) else None
