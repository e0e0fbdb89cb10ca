"""Cut gradients through time: every step reads its state without history.

The read of a slot becomes `cut_history(slot)`. Values do not change; a gradient that arrives at a state from the step
that reads it goes no further, so that only gradients of the same step are left: spatial credit alone, as in OTTT (Xiao
et al. 2022) and SLTT (Meng et al. 2023).

A loop of which every slot is cut needs no loop in the backward pass. When its step treats every sample on its own,
the states are computed without gradients first, and then all steps at once, folded, from the states that are known
by then: `folds_when_cut` says where that is legal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import analyse_dependence, ancestors, is_random, is_size
from snnfx.analysis.leak import StepOnNumbers, fires
from snnfx.errors import InputError, warn_once
from snnfx.ir.program import Region, StepProgram, keeps_statistics
from snnfx.ops.online_functions import cut_history, update_trace
from snnfx.passes.base import Pass
from snnfx.state.step_calls import call_opaque

__all__ = ["CutTemporalEdges", "folds_when_cut", "is_trace_loop"]


@dataclass(frozen=True)
class CutTemporalEdges(Pass):
    """Let no gradient through the states.

    Args:
        slots: "all"; "spiking": those of neurons that fire; or names of slots.
    """

    name = "cut_temporal_edges"
    requires = "normalized"
    ensures = "normalized"

    slots: Literal["all", "spiking"] | tuple[str, ...] = "all"

    def apply(self, program: StepProgram) -> str:
        chosen = self._chosen(program)
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        following = dict(zip((s.name for s in program.slots), program.next_states, strict=True))
        _tell_of_learned_first_states(program, chosen)
        count = 0
        for placeholder in program.slot_nodes():
            slot = placeholder.meta["slot"]
            if slot not in chosen or following[slot] is placeholder:
                continue  # what is never written has no history
            with program.graph.inserting_before(first):
                cut = program.graph.call_function(cut_history, (placeholder,))
            cut.meta = {k: v for k, v in placeholder.meta.items() if k in ("val", "where", "module")}
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
            why = f"the states are {', '.join(names)}."
            raise InputError("SNNFX616", f"there is no state {', '.join(unknown)} to cut", why=why)
        return set(self.slots)


def _tell_of_learned_first_states(program: StepProgram, cut: set[str]) -> None:
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
                f"the first value of `{slot.name}` is learned, but the rule cuts it: it will get no gradient.",
                key=(id(program.source), slot.name),
            )


def is_trace_loop(region: Region) -> bool:
    """Whether a loop is nothing but one trace: `leak * trace + operand`, which has a form of its own."""
    computing = [n for n in region.nodes if n.op.startswith("call")]
    return len(computing) == 1 and computing[0].target is update_trace and len(region.slots) == 1


def folds_when_cut(program: StepProgram, region: Region, inputs: Iterable[Node] = ()) -> bool:
    """Whether a loop may be evaluated folded once its states are known: all of them cut, every node foldable.

    What changes buffers or draws numbers is run once at each step, so it must not be run twice.

    Args:
        program: at stage "partitioned".
        region: of the program.
        inputs: what it takes from outside; everything that varies needs a batch.
    """
    if region.kind != "loop" or not region.slots:
        return False
    for node in region.nodes:
        if node.op == "placeholder":
            if not all(user.target in (cut_history, update_trace) for user in node.users if user.op != "output"):
                return False
        elif (
            "step_refusal" in node.meta
            or is_random(program, node)
            or node.target is call_opaque
            or keeps_statistics(program, node)
        ):
            return False
    values = [n for n in (*region.nodes, *inputs) if not is_size(n) and n.meta.get("varying", True)]
    return all(_has_batch(n.meta.get("batch_dim")) for n in values)


def _has_batch(dim: Any) -> bool:
    return all(map(_has_batch, dim)) if isinstance(dim, tuple) else dim is not None
