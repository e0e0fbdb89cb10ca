"""Part a step into layers: through time inside of a layer, from layer to layer inside of a step.

Two forms of a step compute the same values (for what a layer is, see `snnfx.analysis.recurrent_layers`):

    CutLayers   a value that leaves a layer is read without history, and returned. What is left are gradients of the
                weights of each layer, through time, for a given gradient of what leaves it.
    TapLayers   a value that leaves a layer has a further input added to it, which is zero: that input's gradient is
                the one that arrives at the value. With the states cut, it is the gradient of the same step.

The second form gives the learning signals that the first one is differentiated with: exact in each layer, spatial
between layers, as in OSTL (Bohnstingl et al. 2022, arXiv:2007.12723).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import Node
from torch.utils import _pytree as pytree

from snnfx.analysis.recurrent_layers import is_reader, leaving_values
from snnfx.ir.program import InputLeaf, StepProgram, add_placeholder
from snnfx.ops.online_functions import cut_history
from snnfx.passes.base import Pass

__all__ = ["CutLayers", "TapLayers"]


@dataclass(frozen=True)
class CutLayers(Pass):
    """Let no gradient from layer to layer, and return what leaves them: `(outputs, [values])`."""

    name = "cut_layers"
    requires = "normalized"
    ensures = "normalized"

    def apply(self, program: StepProgram) -> str:
        leaving = leaving_values(program)
        for value, layer in leaving.items():
            _read_instead(program, value, layer, cut_history)
        values = [value for value in leaving if value.op != "placeholder"]
        outputs = pytree.tree_unflatten(list(program.outputs), program.output_spec)
        flat, program.output_spec = pytree.tree_flatten((outputs, values))
        program.set_output(flat, program.next_states, program.initial_values)
        program.carried = [replace(argument, path=(0, *argument.path)) for argument in program.carried]
        return f"{len(leaving)} values hand no gradient to another layer"


@dataclass(frozen=True)
class TapLayers(Pass):
    """Add a further argument to each value that leaves a layer, in the order in which `CutLayers` returns them."""

    name = "tap_layers"
    requires = "normalized"
    ensures = "normalized"

    def apply(self, program: StepProgram) -> str:
        leaving = {value: layer for value, layer in leaving_values(program).items() if value.op != "placeholder"}
        taps = []
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        for value in leaving:
            with program.graph.inserting_before(first):
                tap = add_placeholder(program.graph, f"{value.name}_tap")
            tap.meta = {k: v for k, v in value.meta.items() if k in ("val", "where", "module")} | {"input": tap.name}
            taps.append(tap)
        for tap, (value, layer) in zip(taps, leaving.items(), strict=True):
            _read_instead(program, value, layer, operator.add, tap)
        args, kwargs = pytree.tree_unflatten([0] * len(program.input_leaves), program.input_spec)
        count = len(pytree.tree_leaves(args))
        new = [InputLeaf(tap.name, tap.name) for tap in taps]
        program.input_leaves = [*program.input_leaves[:count], *new, *program.input_leaves[count:]]
        program.input_spec = pytree.tree_structure(((*args, *[0] * len(taps)), kwargs))
        return f"{len(taps)} values have an input added to them"


def _read_instead(
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
