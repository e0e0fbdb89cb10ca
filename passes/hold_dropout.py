"""Draw one dropout mask for a whole sequence.

Replaces `dropout(x)` in training by `x * mask`, where the mask is a state slot: drawn before the first step, never
written. Each trace then belongs to one thinned network. This changes results on purpose: it is the dropout of the
official code of OTTT. Only `nn.Dropout`, `nn.Dropout1d/2d/3d` and their functions are replaced.
Source: OTTT (Xiao et al. 2022).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.ir.edits import add_slot
from snnfx.ir.facts import RETURNED_BY
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import draw_dropout_mask
from snnfx.passes.base import Pass

__all__ = ["HoldDropout"]

_MODULES = {nn.Dropout: "dropout", nn.Dropout1d: "dropout1d", nn.Dropout2d: "dropout2d", nn.Dropout3d: "dropout3d"}


@dataclass(frozen=True)
class HoldDropout(Pass):
    """Replace every dropout by a product with a mask drawn once for a sequence."""

    name = "hold_dropout"
    requires = "normalized"
    ensures = "normalized"
    may_change = ("graph", "slots")

    def apply(self, program: StepProgram) -> str:
        count = 0
        for node in list(program.graph.nodes):
            dropout = _probability_and_name(program, node) if program.training else None
            if dropout is not None:
                _replace_by_mask(program, node, *dropout)
                count += 1
        return f"{count} dropout masks drawn once for a sequence"


def _probability_and_name(program: StepProgram, node: Node) -> tuple[Any, str] | None:
    """The source of the probability (a module path, a node or a number), and the name of the function."""
    if node.op == "call_module":
        module = program.resolve(str(node.target))
        name = _MODULES.get(type(module))
        if name is None or not module.training or len(node.args) != 1:
            return None
        return str(node.target), name
    name = operation_name(node)
    if not node.op.startswith("call") or name not in _MODULES.values():
        return None
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    if training is False:
        return None
    return node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5), name


def _replace_by_mask(program: StepProgram, node: Node, probability: Any, name: str) -> None:
    graph = program.graph
    operand = node.args[0] if node.args else node.kwargs["input"]
    mask = add_slot(program, f"{node.target if node.op == 'call_module' else node.name}.mask", node)
    with graph.inserting_before(node):
        if isinstance(probability, str):
            probability = graph.get_attr(probability)
        initial = graph.call_function(draw_dropout_mask, (probability, operand, name))
        product = graph.call_function(operator.mul, (operand, mask))
    for new in (initial, product):
        new.meta = {k: v for k, v in node.meta.items() if k in ("val", "where", "module", "returned_by")}
    RETURNED_BY.clear(initial)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    program.set_output(program.outputs, (*program.next_states, mask), (*program.initial_values, initial))
