"""Emit the plain multi-step graph, which users see and export: `(inputs...) -> outputs` from the reset state.

It calls the region modules of the graph with state (`snnfx.emit.multi_step`), but neither takes nor returns state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import ancestors, is_random
from snnfx.emit.emitter import Emitted, TargetName
from snnfx.emit.multi_step import MultiStepEmitter
from snnfx.ir.edits import add_placeholder
from snnfx.ir.module_effects import has_effects
from snnfx.ir.program import StepProgram
from snnfx.ops.sequence_functions import move_time, time_steps
from snnfx.ops.step_functions import expect_size
from snnfx.sandbox.torch_internals import pytree

__all__ = ["emit_iterations", "emit_plain"]


def emit_plain(
    program: StepProgram,
    container: str,
    target_name: TargetName,
    regions: dict[str, nn.Module],
    time_dims: Sequence[int | None],
    output_time_dim: int,
    reduce: str | None = None,
) -> Emitted:
    """Emit a partitioned program for whole sequences from the reset state: `(inputs...) -> outputs`.

    Args:
        program: a program at stage "partitioned".
        container: the attribute path under which the net stores the region modules.
        target_name: maps a target of the program to an attribute path on the net.
        regions: the region modules of `emit_multi_step`, which this graph shares.
        time_dims: the time dimension of each tensor input; None for an input that is the same at every step.
        output_time_dim: the time dimension of the outputs.
        reduce: as for `emit_multi_step`.
    """
    return _PlainEmitter(program, container, target_name, regions, time_dims, output_time_dim, reduce).emit()


def emit_iterations(
    program: StepProgram,
    container: str,
    target_name: TargetName,
    regions: dict[str, nn.Module],
    time_dims: Sequence[int | None],
) -> Emitted:
    """Emit the step of a loop from the reset state: `(inputs...) -> (outputs, final states)`.

    Without a sequence among the inputs, the graph also takes a tensor of T elements.

    Args:
        program, container, target_name, regions, time_dims: as for `emit_plain`.
    """
    return _IterationsEmitter(program, container, target_name, regions, time_dims, 0, None).emit()


class _PlainEmitter(MultiStepEmitter):
    """Emits the form without state: regions start from the reset state, and final states are not returned."""

    def __init__(
        self,
        program: StepProgram,
        container: str,
        target_name: TargetName,
        regions: dict[str, nn.Module],
        time_dims: Sequence[int | None],
        output_time_dim: int,
        reduce: str | None,
    ) -> None:
        super().__init__(program, container, target_name, (), reduce)
        self.regions.update(regions)
        self.time_dims, self.output_time_dim = time_dims, output_time_dim

    def placeholders(self) -> None:
        inputs = self.program.input_nodes()
        for node in inputs:
            self.values[node] = add_placeholder(self.graph, node.name)
        sequences = [n for n, dim in zip(inputs, self.time_dims, strict=True) if dim is not None]
        self.time = None if sequences else add_placeholder(self.graph, "time")  # type: ignore[assignment]
        for node, dim in zip(inputs, self.time_dims, strict=True):
            if dim:
                self.values[node] = self.graph.call_method("movedim", (self.values[node], dim, 0))
            self.values[node].meta.update(node.meta)
        self.first_sequence = sequences[0] if sequences else None

    def state_of(self, slots: Sequence[str]) -> Any:
        return None

    def steps(self) -> Node:
        if self.time is None:
            assert self.first_sequence is not None
            self.time = self.graph.call_function(time_steps, (self.values[self.first_sequence],))
        return self.time

    def emit(self) -> Emitted:
        self.placeholders()
        needed = _needed_nodes(self.program)
        for region in self.program.regions:
            if not needed.isdisjoint(region.nodes):
                self.emit_region(region)
        outputs = [self.in_caller_layout(v, self._time_back(self.returned(v))) for v in self.program.outputs]
        self.graph.output(pytree.tree_unflatten(outputs, self.program.output_spec))
        return Emitted(self.graph, self.regions)

    def _time_back(self, value: Any) -> Any:
        if isinstance(value, Node) and self.output_time_dim != 0 and self.reduce is None:
            return self.graph.call_function(move_time, (value, self.output_time_dim))
        return value


class _IterationsEmitter(_PlainEmitter):
    """Emits the form that returns the states after the last step."""

    def emit(self) -> Emitted:
        self.placeholders()
        for region in self.program.regions:
            self.emit_region(region)
        outputs = [self.in_caller_layout(v, self.returned(v)) for v in self.program.outputs]
        finals = [self.final_state(slot.name) for slot in self.program.slots]
        self.graph.output((tuple(outputs), tuple(finals)))
        return Emitted(self.graph, self.regions)


def _needed_nodes(program: StepProgram) -> set[Node]:
    """The nodes that outputs depend on, or that have effects; the others compute only final states."""
    values = zip(program.slot_nodes(), program.next_states, program.initial_values, strict=True)
    states = {node: [v for v in (following, initial) if isinstance(v, Node)] for node, following, initial in values}
    effects = (
        n for n in program.graph.nodes if n.target is expect_size or has_effects(program, n) or is_random(program, n)
    )
    needed = ancestors([*(v for v in program.outputs if isinstance(v, Node)), *effects])
    while True:
        more = {v for slot, reads in states.items() if slot in needed for v in reads}
        # A region runs as a whole, so it needs the operands of all its nodes.
        more |= {n for region in program.regions if not needed.isdisjoint(region.nodes) for n in region.nodes}
        if more <= needed:
            return needed
        needed |= ancestors(list(more))
