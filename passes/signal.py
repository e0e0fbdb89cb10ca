"""Let the error reach a neuron only from the readout, not through other neurons.

A weight that feeds a neuron which fires gets an operand without history: no error goes through that neuron to those in
front of it. What is left are the paths from the output back to the first neurons on the way, the learning signals of
e-prop (Bellec et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

from snnfx.online_ops import cut_history
from snnfx.passes.base import Pass
from snnfx.passes.dependence import analyse_dependence
from snnfx.passes.leak import StepOnNumbers, fed_slots, fires
from snnfx.passes.trace import weight_ops
from snnfx.program import StepProgram

__all__ = ["CutSpatialEdges"]


@dataclass(frozen=True)
class CutSpatialEdges(Pass):
    """Cut the operand of every weight that feeds a neuron that fires."""

    name = "readout_signal"
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
            cut.meta = {k: v for k, v in op.operand.meta.items() if k in ("val", "where", "module")}
            op.node.replace_input_with(op.operand, cut)
        return f"{len(ops)} weights hand no error on to the neurons in front of them"
