"""What a kernel saves in its forward pass for the backward pass: a minimum vertex cut over one step.

The backward pass reads some values of the forward pass. Each is either saved at every step or recomputed from what is
saved. A state before a step may also come from what was saved at the step before it, along the loop-carried edge
`next state (t-1) -> state (t)`, but from no earlier one: the backward pass goes through time only once.

The cut is that of Chen et al. (2016) as a flow problem (Ford & Fulkerson; PyTorch's min-cut partitioner does the same
for whole graphs), with two more rules: edges through time, and inputs of the step at a low price, since autograd keeps
most of them alive for the layer in front anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

from snnfx.lowering.elementwise.expressions import TANGENTS, Expression, StepExpressions, topological

__all__ = ["SavePlan", "depends_on_gradient", "plan_saving"]

_PRICE = {"float32": 1.0, "float64": 2.0}
_INPUT = 0.25
"""Of an input that is kept, as a part of the price of its size."""


@dataclass(frozen=True)
class SavePlan:
    """What is kept of each step.

    Args:
        saved: values that the forward pass writes, `[T, N, *]` each.
        inputs: inputs of the step that are kept.
        earlier: states before a step that are recomputed from what was saved at the step before it.
    """

    saved: tuple[Expression, ...]
    inputs: tuple[int, ...]
    earlier: tuple[int, ...]


def depends_on_gradient(roots: Iterable[Expression]) -> set[Expression]:
    """Those of the expressions behind some that belong to the backward pass alone."""
    found: set[Expression] = set()
    for expression in topological(roots):
        if expression.op in TANGENTS or any(o in found for o in expression.operands):
            found.add(expression)
    return found


def plan_saving(step: StepExpressions, gradients: Sequence[Expression]) -> SavePlan:
    """Choose what to save for these gradients."""
    backward = depends_on_gradient(gradients)
    read = {o for e in topological(gradients) if e in backward for o in e.operands if o not in backward}
    read |= {g for g in gradients if g not in backward}
    needed = [e for e in topological(read) if e in read and e.op not in ("constant", "scalar", "invariant")]
    if not needed:
        return SavePlan((), (), ())
    cuts = [_cut(step, needed, through_time=False), _cut(step, needed, through_time=True)]
    plans = [_pruned(step, needed, cut) for cut in cuts if cut is not None and _is_enough(step, needed, cut)]
    best = min(plans, key=_price)
    return SavePlan(
        tuple(e for e in best if e.op != "sequence"),
        tuple(e.index for e in best if e.op == "sequence"),
        tuple(sorted(_states_read(needed, best))),
    )


def _price(cut: Sequence[Expression]) -> float:
    return sum(_price_of(e) for e in cut)


def _price_of(expression: Expression) -> float:
    price = _PRICE.get(expression.dtype, float("inf"))
    # A sequence of booleans is one byte an element in memory.
    return (price if price != float("inf") else 1.0) * _INPUT if expression.op == "sequence" else price


def _cut(step: StepExpressions, needed: Sequence[Expression], through_time: bool) -> list[Expression] | None:
    """The cheapest set of values on all paths from inputs and states to what is needed; None where there is none."""
    graph = nx.DiGraph()
    roots = [*needed, *step.next_states] if through_time else list(needed)
    for expression in topological(roots):
        if expression.op in ("constant", "scalar", "invariant"):
            continue
        inside, outside = (expression, "in"), (expression, "out")
        price = _price_of(expression)
        comes_from_before = through_time and expression.op == "state"
        if price != float("inf") and not comes_from_before:
            graph.add_edge(inside, outside, capacity=price)
        else:
            graph.add_edge(inside, outside)
        for operand in expression.operands:
            if operand.op not in ("constant", "scalar", "invariant"):
                graph.add_edge((operand, "out"), inside)
                if through_time and operand.op == "state":
                    # At the step before, there is no state to start from.
                    graph.add_edge("source", inside)
        if expression.op == "sequence" or (expression.op == "state" and not through_time):
            graph.add_edge("source", inside)
        if comes_from_before:
            following = step.next_states[expression.index]
            if following.op == "state":
                graph.add_edge("source", inside)
            elif following.op not in ("constant", "scalar", "invariant"):
                graph.add_edge((following, "out"), inside)
    for expression in needed:
        graph.add_edge((expression, "out"), "sink")
    if "source" not in graph or not nx.has_path(graph, "source", "sink"):
        return []
    try:
        _, (reachable, _) = nx.minimum_cut(graph, "source", "sink")
    except nx.NetworkXUnbounded:
        return None
    return sorted(
        (e for e, side in (n for n in reachable if n != "source") if side == "in" and (e, "out") not in reachable),
        key=lambda e: e.number,
    )


def _is_enough(step: StepExpressions, needed: Sequence[Expression], cut: Sequence[Expression]) -> bool:
    """Whether everything needed can be computed from a set of saved values."""
    here = topological(needed, cut)
    if any(e.op == "sequence" and e not in cut for e in here):
        return False
    for index in _states_read(needed, cut):
        before = topological([step.next_states[index]], cut)
        if any(e.op in ("sequence", "state") and e not in cut for e in before):
            return False
    return True


def _states_read(needed: Sequence[Expression], cut: Sequence[Expression]) -> set[int]:
    return {e.index for e in topological(needed, cut) if e.op == "state" and e not in cut}


def _pruned(step: StepExpressions, needed: Sequence[Expression], cut: Sequence[Expression]) -> list[Expression]:
    """Without what is not missed, most expensive first."""
    kept = list(cut)
    for expression in sorted(cut, key=_price_of, reverse=True):
        fewer = [e for e in kept if e is not expression]
        if _is_enough(step, needed, fewer):
            kept = fewer
    return kept
