"""Choose the values that a kernel saves for backward: a minimum vertex cut over one step.

The backward pass reads some values of the forward pass. Each is either saved at every step or recomputed from saved
values. A state before a step may also be recomputed from values saved at the previous step, along the loop-carried edge
`next state (t-1) -> state (t)`, but not from earlier steps: the backward pass visits each step once.

The cut solves the recomputation problem of Chen et al. (2016) as a flow problem (Ford & Fulkerson; PyTorch's min-cut
partitioner does the same for whole graphs), with two additions: edges through time, and a low cost for inputs of the
step, since autograd mostly saves them for the layer in front anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snnfx.analysis.vertex_cut import VertexCut
from snnfx.lowering.elementwise.expressions import GRADIENT_LEAVES, Expression, StepExpressions, topological

__all__ = ["SavePlan", "depends_on_gradient", "plan_saving"]

_COST = {"float32": 1.0, "float64": 2.0, "int32": 1.0, "int64": 2.0}
_INPUT_DISCOUNT = 0.25
"""Cost of saving an input, relative to its size."""


@dataclass(frozen=True)
class SavePlan:
    """The values of each step that are saved for backward.

    Args:
        saved: values that the forward pass writes, `[T, N, *]` each.
        inputs: indices of the inputs that are saved.
        earlier: indices of the states before a step that are recomputed from values saved at the previous step.
    """

    saved: tuple[Expression, ...]
    inputs: tuple[int, ...]
    earlier: tuple[int, ...]


def depends_on_gradient(roots: Iterable[Expression]) -> set[Expression]:
    """The expressions, among the roots and their operands, that depend on a gradient."""
    dependent: set[Expression] = set()
    for expression in topological(roots):
        if expression.op in GRADIENT_LEAVES or any(o in dependent for o in expression.operands):
            dependent.add(expression)
    return dependent


def plan_saving(step: StepExpressions, gradients: Sequence[Expression]) -> SavePlan:
    """Choose the values to save for these gradients."""
    backward = depends_on_gradient(gradients)
    read = {o for e in topological(gradients) if e in backward for o in e.operands if o not in backward}
    read |= {g for g in gradients if g not in backward}
    needed = [e for e in topological(read) if e in read and e.op not in ("constant", "scalar", "invariant")]
    if not needed:
        return SavePlan((), (), ())
    cuts = [_cut(step, needed, through_time=False), _cut(step, needed, through_time=True)]
    plans = [_pruned(step, needed, cut) for cut in cuts if cut is not None and _suffices(step, needed, cut)]
    best = min(plans, key=_cost)
    return SavePlan(
        tuple(e for e in best if e.op != "sequence"),
        tuple(e.index for e in best if e.op == "sequence"),
        tuple(sorted(_states_read(needed, best))),
    )


def _cost(cut: Sequence[Expression]) -> float:
    return sum(_cost_of(e) for e in cut)


def _cost_of(expression: Expression) -> float:
    price = _COST.get(expression.dtype, math.inf)
    # An input of booleans has one byte per element in memory.
    return (price if price != math.inf else 1.0) * _INPUT_DISCOUNT if expression.op == "sequence" else price


def _cut(step: StepExpressions, needed: Sequence[Expression], through_time: bool) -> list[Expression] | None:
    """The cheapest set of values that cuts all paths from inputs and states to `needed`; None if there is none."""
    graph = VertexCut[Expression]()
    roots = [*needed, *step.next_states] if through_time else list(needed)
    for expression in topological(roots):
        if expression.op in ("constant", "scalar", "invariant"):
            continue
        comes_from_before = through_time and expression.op == "state"
        graph.add_value(expression, math.inf if comes_from_before else _cost_of(expression))
        for operand in expression.operands:
            if operand.op not in ("constant", "scalar", "invariant"):
                graph.add_operand(expression, operand)
                if through_time and operand.op == "state":
                    # The state before the previous step is not available.
                    graph.add_source(expression)
        if expression.op == "sequence" or (expression.op == "state" and not through_time):
            graph.add_source(expression)
        if comes_from_before:
            following = step.next_states[expression.index]
            if following.op == "state":
                graph.add_source(expression)
            elif following.op not in ("constant", "scalar", "invariant"):
                graph.add_operand(expression, following)
    for expression in needed:
        graph.add_needed(expression)
    cheapest = graph.cheapest()
    return None if cheapest is None else sorted(cheapest, key=lambda e: e.number)


def _suffices(step: StepExpressions, needed: Sequence[Expression], cut: Sequence[Expression]) -> bool:
    """Whether all needed values can be computed from a set of saved values."""
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
    """Drop values that are not needed, most expensive first."""
    remaining = list(cut)
    for expression in sorted(cut, key=_cost_of, reverse=True):
        fewer = [e for e in remaining if e is not expression]
        if _suffices(step, needed, fewer):
            remaining = fewer
    return remaining
