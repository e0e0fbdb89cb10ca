"""Cut gradients through time: every step reads its state detached.

Replaces every read of a slot by `cut_history(slot)`. Values do not change; gradients stop at the state, so only the
gradients within a step remain: spatial credit alone.

A loop whose slots are all cut needs no loop in the backward pass. If its step is independent along the batch, the
states are computed without gradients first, then all steps at once, folded, from the known states
(`snnfx.analysis.foldable_loops.folds_when_cut`).
Source: OTTT (Xiao et al. 2022), SLTT (Meng et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import analyse_dependence, ancestors
from snnfx.analysis.leak import fires
from snnfx.analysis.step_on_numbers import StepOnNumbers
from snnfx.errors import InputError, warn_once
from snnfx.ir.facts import SLOT, copy_facts
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import cut_history
from snnfx.passes.base import Pass

__all__ = ["CutTemporalEdges"]


@dataclass(frozen=True)
class CutTemporalEdges(Pass):
    """Detach the states that a step reads.

    Args:
        slots: "all"; "spiking": the slots of neurons that fire; or names of slots.
    """

    name = "cut_temporal_edges"
    requires = "normalized"
    ensures = "normalized"

    slots: Literal["all", "spiking"] | tuple[str, ...] = "all"

    def apply(self, program: StepProgram) -> str:
        chosen = self._chosen(program)
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        following = dict(zip((s.name for s in program.slots), program.next_states, strict=True))
        _warn_of_learned_initial_states(program, chosen)
        count = 0
        for placeholder in program.slot_nodes():
            slot = SLOT.of(placeholder)
            if slot not in chosen or following[slot] is placeholder:
                continue  # a slot that is never written has no autograd graph
            with program.graph.inserting_before(first):
                cut = program.graph.call_function(cut_history, (placeholder,))
            copy_facts(placeholder, cut)
            for user in list(placeholder.users):
                if user is not cut:
                    user.replace_input_with(placeholder, cut)
            count += 1
        return f"{count} of {len(program.slots)} states cut"

    def _chosen(self, program: StepProgram) -> set[str]:
        names = [slot.name for slot in program.slots]
        if self.slots == "all":
            return set(names)
        if self.slots == "spiking":
            step = StepOnNumbers(program)
            return {name for name in names if fires(step, program, name)}
        unknown = sorted(set(self.slots) - set(names))
        if unknown:
            why = f"the states of this model are {', '.join(names)}."
            raise InputError("SNNFX616", f"unknown state {', '.join(unknown)}", why=why)
        return set(self.slots)


def _warn_of_learned_initial_states(program: StepProgram, cut: set[str]) -> None:
    initial_only = analyse_dependence(program).initial_only
    for slot, initial in zip(program.slots, program.initial_values, strict=True):
        if slot.name not in cut or not isinstance(initial, Node):
            continue
        own = ancestors([initial]) & initial_only
        read = {initial, *(operand for node in own for operand in node.all_input_nodes)}
        values = [program.resolve(str(n.target)) for n in read if n.op == "get_attr"]
        if any(isinstance(value, nn.Parameter) and value.requires_grad for value in values):
            warn_once(
                "SNNFX619",
                f"the initial value of `{slot.name}` is learned, but gets no gradient: the rule detaches this state. "
                "Exempt it with cut=<names of the other slots>, or freeze the parameter.",
                key=(id(program.source), slot.name),
            )
