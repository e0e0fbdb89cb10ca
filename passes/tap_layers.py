"""Add an input of zeros to each output value of a layer, to read its gradient.

Replaces reads of `z` outside its layer by `z + tap`, where `tap` is a new input of the step. Legal because the caller
passes zeros. The gradient of `tap` is the gradient of `z`; with cut states, it is the gradient within one time step,
the learning signal of OSTL. `CutLayers` provides the graph that this gradient is applied to.
Source: Bohnstingl et al. 2022, arXiv:2007.12723.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from snnfx.analysis.recurrent_layers import leaving_values
from snnfx.ir.edits import add_placeholder, replace_reads_outside
from snnfx.ir.program import InputLeaf, StepProgram
from snnfx.passes.base import Pass
from snnfx.sandbox.torch_internals import pytree

__all__ = ["TapLayers"]


@dataclass(frozen=True)
class TapLayers(Pass):
    """Add one argument to each output value of a layer, in the order in which `CutLayers` returns them."""

    name = "tap_layers"
    requires = "normalized"
    ensures = "normalized"
    may_change = ("graph", "inputs")

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
            replace_reads_outside(program, value, layer, operator.add, tap)
        args, kwargs = pytree.tree_unflatten([0] * len(program.input_leaves), program.input_spec)
        count = len(pytree.tree_leaves(args))
        new = [InputLeaf(tap.name, tap.name) for tap in taps]
        program.input_leaves = [*program.input_leaves[:count], *new, *program.input_leaves[count:]]
        program.input_spec = pytree.tree_structure(((*args, *[0] * len(taps)), kwargs))
        return f"inputs added to {len(taps)} values"
