"""Emit the graph of a single step: one call of a loop region that contains the whole step."""

from __future__ import annotations

import operator

from torch.fx import Node

from snnfx.emit.emitter import Emitted, Emitter, TargetName
from snnfx.emit.region_builder import whole_step
from snnfx.ir.program import StepProgram
from snnfx.ops.sequence_functions import call_module
from snnfx.regions.region_modules import LoopRegion

__all__ = ["emit_single_step"]


def emit_single_step(program: StepProgram, container: str, target_name: TargetName) -> Emitted:
    """Emit a program for one step: `(inputs..., state=None) -> (outputs, {slot: next value}, ())`."""
    return _SingleStepEmitter(program, container, target_name).emit()


class _SingleStepEmitter(Emitter):
    def emit(self) -> Emitted:
        self.placeholders()
        program = self.program
        slots = [slot.name for slot in program.slots]
        builder = whole_step(program)
        output_nodes = [n for n in program.outputs if isinstance(n, Node)]

        def make() -> LoopRegion:
            step = builder.graph_module(output_nodes, program.next_states, slots)
            return LoopRegion("step", step, builder.graph_module(output_nodes, program.next_states, slots, first=True))

        module = self.region("step", make)
        arguments = [self.attribute(key) if isinstance(key, str) else self._constant(key) for key in builder.constants]
        arguments += [self.values[node] for node in builder.inputs]
        state = self.state_of(slots)
        call = self.graph.call_function(call_module, (module, *arguments, state), name="step")
        outputs = self.graph.call_function(operator.getitem, (call, 0))
        next_states = self.graph.call_function(operator.getitem, (call, 1))
        values = [
            self.in_caller_layout(v, self.graph.call_function(operator.getitem, (outputs, output_nodes.index(v))))
            if isinstance(v, Node)
            else v
            for v in program.outputs
        ]
        next_by_slot = {
            slot: self.graph.call_function(operator.getitem, (next_states, index)) for index, slot in enumerate(slots)
        }
        return self.finish(values, next_by_slot)

    def _constant(self, node: Node) -> Node:
        return self.values[node] if node in self.values else self.attribute(str(node.target))
