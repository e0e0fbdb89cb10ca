"""Cut the gradients between the layers of a step, and return the values that leave a layer.

`y = layer2(layer1(x))` becomes `layer2(cut(z)), z` with `z = layer1(x)` (for what a layer is, see
`snnfx.analysis.recurrent_layers`). What remains are the gradients of the weights of each layer, through time, for a
given gradient of the values that leave it: exact in each layer, spatial between layers, as in OSTL (Bohnstingl et al.
2022, arXiv:2007.12723). `TapLayers` gives those gradients.
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
    """Let no gradient from layer to layer, and return what leaves them: `(outputs, [values])`."""

    name = "cut_layers"
    requires = "normalized"
    ensures = "normalized"

    def apply(self, program: StepProgram) -> str:
        leaving = leaving_values(program)
        for value, layer in leaving.items():
            replace_reads_outside(program, value, layer, cut_history)
        values = [value for value in leaving if value.op != "placeholder"]
        outputs = pytree.tree_unflatten(list(program.outputs), program.output_spec)
        flat, program.output_spec = pytree.tree_flatten((outputs, values))
        program.set_output(flat, program.next_states, program.initial_values)
        program.carried = [replace(argument, path=(0, *argument.path)) for argument in program.carried]
        return f"{len(leaving)} values hand no gradient to another layer"
