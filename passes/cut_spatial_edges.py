"""Propagate the error from the readout only, not through spiking neurons.

Replaces the operand of every weight that feeds a spiking neuron by its detached value. Values do not change; no error
passes through that neuron to earlier ones. The remaining paths lead from the output back to the nearest neurons: the
learning signals of e-prop.
Source: Bellec et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import analyse_dependence
from snnfx.analysis.leak import fed_slots, fires
from snnfx.analysis.step_on_numbers import StepOnNumbers
from snnfx.analysis.weight_ops import weight_ops
from snnfx.errors import InputError
from snnfx.ir.facts import copy_facts
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import cut_history
from snnfx.passes.base import Pass

__all__ = ["CutSpatialEdges"]


@dataclass(frozen=True)
class CutSpatialEdges(Pass):
    """Detach the operand of every weight that feeds a spiking neuron."""

    name = "cut_spatial_edges"
    requires = "normalized"
    ensures = "normalized"

    def apply(self, program: StepProgram) -> str:
        step = StepOnNumbers(program)
        spiking = {slot.name for slot in program.slots if fires(step, program, slot.name)}
        weights = weight_ops(program, analyse_dependence(program))
        operands = [(op.node, op.operand) for op in weights]
        ops = [op for op in weights if spiking & set(fed_slots(step, program, op.node, operands))]
        for op in ops:
            with program.graph.inserting_before(op.node):
                cut = program.graph.call_function(cut_history, (op.operand,))
            copy_facts(op.operand, cut)
            op.node.replace_input_with(op.operand, cut)
        _refuse_weights_without_signal(program, [op.node for op in weights])
        return f"{len(ops)} weights propagate no error to earlier neurons"


def _refuse_weights_without_signal(program: StepProgram, weights: Iterable[Node]) -> None:
    """Refuse weights that no error reaches: they would silently stay untrained.

    Raises:
        InputError: SNNFX616.
    """
    following = dict(zip(program.slot_nodes(), program.next_states, strict=True))
    reached: set[Node] = set()
    stack = [value for value in program.outputs if isinstance(value, Node)]
    while stack:
        node = stack.pop()
        if node not in reached and node.target is not cut_history:
            reached.add(node)
            before = [*node.all_input_nodes, following.get(node)]
            stack.extend(n for n in before if isinstance(n, Node))
    missed = [f"`{describe_node(node)}`" for node in weights if node not in reached and _is_trained(program, node)]
    if missed:
        raise InputError(
            "SNNFX616",
            f"no learning signal reaches the weights of {', '.join(missed)}",
            why='with signal="readout", no error passes through a spiking neuron.',
            hint="Connect the neurons of these weights to a readout that does not fire (e.g. LeakyIntegrator), freeze "
            "the weights, or choose signal='spatial'.",
        )


def _is_trained(program: StepProgram, node: Node) -> bool:
    targets = [n.target for n in (node, *node.all_input_nodes) if n.op in ("call_module", "get_attr")]
    values = [program.resolve(str(target)) for target in targets]
    found = (p for value in values for p in (value.parameters() if isinstance(value, nn.Module) else [value]))
    return any(isinstance(p, nn.Parameter) and p.requires_grad for p in found)
