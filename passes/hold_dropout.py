"""Hold the mask of a dropout for a whole sequence: it becomes a state that is drawn once and never written again.

The official code of OTTT (Xiao et al. 2022) draws the mask once for a sequence, so that the trace of an operand is that
of one thinned network. Only `nn.Dropout`, its relatives that drop channels, and their functions are replaced, in
training.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.ir.edits import add_slot
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import draw_dropout_mask
from snnfx.passes.base import Pass

__all__ = ["HoldDropout"]

_MODULES = {nn.Dropout: "dropout", nn.Dropout1d: "dropout1d", nn.Dropout2d: "dropout2d", nn.Dropout3d: "dropout3d"}


@dataclass(frozen=True)
class HoldDropout(Pass):
    """Draw the mask of every dropout once for a sequence."""

    name = "hold_dropout"
    requires = "normalized"
    ensures = "normalized"

    def apply(self, program: StepProgram) -> str:
        held = 0
        for node in list(program.graph.nodes):
            found = _dropout(program, node) if program.training else None
            if found is not None:
                _hold(program, node, *found)
                held += 1
        return f"{held} dropout masks held"


def _dropout(program: StepProgram, node: Node) -> tuple[Any, str] | None:
    """What the probability is read from, and the name of the function."""
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


def _hold(program: StepProgram, node: Node, how: Any, name: str) -> None:
    graph = program.graph
    operand = node.args[0] if node.args else node.kwargs["input"]
    mask = add_slot(program, f"{node.target if node.op == 'call_module' else node.name}.mask", node)
    with graph.inserting_before(node):
        if isinstance(how, str):
            how = graph.get_attr(how)
        initial = graph.call_function(draw_dropout_mask, (how, operand, name))
        product = graph.call_function(operator.mul, (operand, mask))
    for new in (initial, product):
        new.meta = {k: v for k, v in node.meta.items() if k in ("val", "where", "module", "returned_by")}
    initial.meta.pop("returned_by", None)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    program.set_output(program.outputs, (*program.next_states, mask), (*program.initial_values, initial))
