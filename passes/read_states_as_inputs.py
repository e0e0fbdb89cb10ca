"""Replace state slots by inputs, so that a step with known states has no loop.

The step graph then has no cycle, so any set of time steps can be folded, in any order; the next states are not
computed. Legal if the caller passes the states of each step. SLTT-K computes the gradients of K steps of a sequence in
this way.
Source: SLTT-K (Meng et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from snnfx.ir.facts import INPUT, SLOT
from snnfx.ir.module_effects import keeps_statistics
from snnfx.ir.program import InputLeaf, StepProgram
from snnfx.passes.base import Pass
from snnfx.sandbox.torch_internals import pytree

__all__ = ["ReadStatesAsInputs"]


@dataclass(frozen=True)
class ReadStatesAsInputs(Pass):
    """Make every slot an additional positional argument of the step, in the order of the slots."""

    name = "read_states_as_inputs"
    requires = "normalized"
    ensures = "normalized"
    may_change = ("graph", "slots", "inputs", "outputs")

    def apply(self, program: StepProgram) -> str:
        count = len(program.slots)
        args, kwargs = pytree.tree_unflatten([0] * len(program.input_leaves), program.input_spec)
        leaves = list(program.input_leaves)
        positional = len(pytree.tree_leaves(args))
        new = [InputLeaf(slot.name, slot.placeholder) for slot in program.slots]
        program.input_leaves = [*leaves[:positional], *new, *leaves[positional:]]
        program.input_spec = pytree.tree_structure(((*args, *[0] * count), kwargs))
        for placeholder in program.slot_nodes():
            SLOT.clear(placeholder)
            INPUT.set(placeholder, placeholder.name)
        program.set_output(program.outputs, (), ())
        program.slots, program.carried, program.first_step = [], [], None
        for node in reversed(list(program.graph.nodes)):
            if node.op not in ("placeholder", "output") and not node.users and not keeps_statistics(program, node):
                program.graph.erase_node(node)
        return f"{count} states are inputs"
