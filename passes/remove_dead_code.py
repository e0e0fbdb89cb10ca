"""Remove nodes whose value is not needed (dead code elimination).

Needed are the outputs of a step, the next value of every slot (`net.run` returns it), initial values and size checks,
layers in training mode that update running statistics, and modules that run without capture, whose effects are unknown.
Legal because other nodes have no effect. A check of the number of values that a state stacks is not needed: it follows
from the next value of the state. A slot that capture discovered by watching attributes is needed only if a
value depends on it, its own next value included: an attribute that is written but never read is not a state.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from snnfx.analysis.dependence import ancestors
from snnfx.ir.module_effects import flags_of_updates, has_effects, keeps_statistics
from snnfx.ir.program import StepProgram
from snnfx.ir.setting_read import SettingRead
from snnfx.ops.step_functions import expect_size
from snnfx.passes.base import Pass

__all__ = ["RemoveDeadCode"]


@dataclass(frozen=True)
class RemoveDeadCode(Pass):
    """Remove nodes without effect, and discovered slots that no value depends on."""

    name = "remove_dead_code"
    requires = "normalized"  # before, an in-place operation without readers seems dead
    may_change = ("graph", "slots")

    def apply(self, program: StepProgram) -> str:
        before = len(program.graph.nodes)
        called = _updating_calls(program)
        dropped = _drop_unread_slots(program)
        _remove_proven_checks(program)
        _remove_dead_nodes(program)
        if program.first_step is not None:
            _keep_slots(program.first_step, {slot.name for slot in program.slots})
            _remove_dead_nodes(program.first_step)
        # A call that is removed because its layer is not in training mode is needed once it is.
        kept = _updating_calls(program)
        program.setting_reads += [flag for name, flag in called.items() if name not in kept]
        removed = before - len(program.graph.nodes)
        if not dropped:
            return f"removed {removed} nodes"
        return f"removed {removed} nodes and the unread attributes {', '.join(dropped)}"


def _updating_calls(program: StepProgram) -> dict[str, SettingRead]:
    """The `training` flags of the layers that the step calls and that update their buffers in training mode."""
    steps = (program, *([] if program.first_step is None else [program.first_step]))
    calls = ((step, node) for step in steps for node in step.graph.nodes if keeps_statistics(step, node))
    return {flag.owner: flag for step, node in calls for flag in flags_of_updates(step, node)}


def _remove_dead_nodes(program: StepProgram) -> None:
    kept = [
        n for n in program.graph.nodes if n.op == "placeholder" or n.target is expect_size or has_effects(program, n)
    ]
    live = ancestors([program.output, *kept])
    for node in reversed(list(program.graph.nodes)):
        if node not in live:
            program.graph.erase_node(node)


def _remove_proven_checks(program: StepProgram) -> None:
    """Remove checks of the number of values that a state stacks; a call checks the shapes of given states."""
    following = dict(zip(program.slot_nodes(), program.next_states, strict=True))
    for node in list(program.graph.nodes):
        if node.target is not expect_size or node.users:
            continue
        size, expected = node.args[:2]
        shape, dim = size.args if isinstance(size, Node) and size.target is operator.getitem else (None, None)
        if not isinstance(shape, Node) or shape.target is not getattr or shape.args[1] != "shape":
            continue
        state = shape.args[0]
        if isinstance(state, Node) and _stacked_along(following.get(state), dim) == expected:
            program.graph.erase_node(node)


def _stacked_along(value: Any, dim: Any) -> int | None:
    """The number of values that `torch.stack` joins along a dimension."""
    if not isinstance(value, Node) or value.target is not torch.stack or not isinstance(value.args[0], list | tuple):
        return None
    along = value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", 0)
    return len(value.args[0]) if along == dim else None


def _drop_unread_slots(program: StepProgram) -> list[str]:
    """Drop discovered slots that no output and no slot depends on; return their names."""
    placeholders = dict(zip((s.name for s in program.slots), program.slot_nodes(), strict=True))
    following = dict(zip((s.name for s in program.slots), program.next_states, strict=True))
    initial = dict(zip((s.name for s in program.slots), program.initial_values, strict=True))
    needed = {
        s.name for s in program.slots if not s.discovered or _reads_itself(placeholders[s.name], following[s.name])
    }
    while True:
        roots = [n for n in program.outputs if isinstance(n, Node)]
        roots += [n for n in program.graph.nodes if has_effects(program, n)]
        roots += [value for name in needed for value in (following[name], initial[name]) if isinstance(value, Node)]
        live = ancestors(roots)
        new = {name for name, node in placeholders.items() if node in live} - needed
        if not new:
            break
        needed |= new
    dropped = [s.name for s in program.slots if s.name not in needed]
    _keep_slots(program, needed)
    return dropped


def _reads_itself(placeholder: Node, following: Any) -> bool:
    """Whether the next value of a slot depends on its value, e.g. a running total or a count of the steps."""
    if not isinstance(following, Node):
        return False
    return following is not placeholder and placeholder in ancestors([following])


def _keep_slots(program: StepProgram, names: set[str]) -> None:
    """Remove all other slots and the nodes computed from them."""
    kept = [i for i, slot in enumerate(program.slots) if slot.name in names]
    if len(kept) == len(program.slots):
        return
    gone = {node for slot, node in zip(program.slots, program.slot_nodes(), strict=True) if slot.name not in names}
    program.set_output(
        program.outputs, [program.next_states[i] for i in kept], [program.initial_values[i] for i in kept]
    )
    program.slots = [program.slots[i] for i in kept]
    for node in reversed(list(program.graph.nodes)):
        if not node.users and ancestors([node]) & gone:
            program.graph.erase_node(node)
