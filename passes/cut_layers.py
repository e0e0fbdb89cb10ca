"""Cut gradients between layers, and return the output values of each layer.

Replaces `y = layer2(layer1(x))` by `layer2(detach(z)), z` with `z = layer1(x)`; `snnfx.analysis.recurrent_layers`
defines a layer. Values do not change. The remaining gradients are those of the weights of each layer, through time, for
a given gradient of its outputs: exact in each layer, spatial between layers, as in OSTL. `TapLayers` provides the
gradients of the outputs.
Source: Bohnstingl et al. 2022, arXiv:2007.12723.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from snnfx.analysis.recurrent_layers import leaving_values
from snnfx.ir.edits import replace_reads_outside
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import cut_history
from snnfx.passes.base import Pass
from snnfx.sandbox.torch_internals import pytree

__all__ = ["CutLayers"]


@dataclass(frozen=True)
class CutLayers(Pass):
    """Detach values between layers and return the outputs of layers as well: `(outputs, [values])`."""

    name = "cut_layers"
    requires = "normalized"
    ensures = "normalized"
    may_change = ("graph", "outputs")

    def apply(self, program: StepProgram) -> str:
        leaving = leaving_values(program)
        for value, layer in leaving.items():
            replace_reads_outside(program, value, layer, cut_history)
        values = [value for value in leaving if value.op != "placeholder"]
        outputs = pytree.tree_unflatten(list(program.outputs), program.output_spec)
        flat, program.output_spec = pytree.tree_flatten((outputs, values))
        program.set_output(flat, program.next_states, program.initial_values)
        program.carried = [replace(argument, path=(0, *argument.path)) for argument in program.carried]
        return f"{len(leaving)} values detached between layers"
