"""Cut the gradients between the layers of a step, and return the values that leave a layer.

`y = layer2(layer1(x))` becomes `layer2(cut(z)), z` with `z = layer1(x)` (for what a layer is, see
`snnfx.analysis.recurrent_layers`). What remains are the gradients of the weights of each layer, through time, for a
given gradient of the values that leave it: exact in each layer, spatial between layers, as in OSTL (Bohnstingl et al.
2022, arXiv:2007.12723). `TapLayers` gives those gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import Node

from snnfx.analysis.recurrent_layers import is_reader, leaving_values
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import cut_history
from snnfx.passes.base import Pass
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "CutLayers",
]


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


def replace_reads_outside(
    program: StepProgram, value: Node, layer: set[Node], function: Callable[..., object], *more: Node
) -> None:
    """Make everything outside of its layer read `function(value, *more)` instead of a value."""
    graph = program.graph
    readers = [user for user in value.users if is_reader(user, layer)]
    behind = value.next if value.op != "placeholder" else next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(behind):
        new = graph.call_function(function, (value, *more))
    new.meta = {k: v for k, v in value.meta.items() if k in ("val", "where", "module")}
    for user in readers:
        user.replace_input_with(value, new)
    own = {slot.placeholder for slot in program.slots if program.nodes_by_name[slot.placeholder] in layer}
    program.set_output(
        [new if output is value else output for output in program.outputs],
        [
            new if following is value and slot.placeholder not in own else following
            for slot, following in zip(program.slots, program.next_states, strict=True)
        ],
        program.initial_values,
    )
