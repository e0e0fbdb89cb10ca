"""Emit the plain multi-step graph, which a user sees and exports: from sequences to outputs, from the reset state.

It calls the region modules of the graph with state (`snnfx.emit.multi_step`); no state goes in or out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.emit.emitter import Emitted, TargetName
from snnfx.emit.multi_step import MultiStepEmitter
from snnfx.ir.edits import add_placeholder
from snnfx.ir.program import StepProgram
from snnfx.ops.sequence_functions import time_steps
from snnfx.sandbox.torch_internals import pytree

__all__ = ["emit_plain"]


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
        program: at stage "partitioned".
        container: where the net keeps the region modules.
        target_name: from a target of the program to the attribute path on the net.
        regions: the region modules of `emit_multi_step`, used again.
        time_dims: where T is in each tensor input, None for one that is the same at every step.
        output_time_dim: where T is in the outputs.
        reduce: as for `emit_multi_step`.
    """
    return _PlainEmitter(program, container, target_name, regions, time_dims, output_time_dim, reduce).emit()


class _PlainEmitter(MultiStepEmitter):
    """The form without state: what is read at the start is the reset state, final states are not returned."""

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
        carriers = [n for n, dim in zip(inputs, self.time_dims, strict=True) if dim is not None]
        self.time = None if carriers else add_placeholder(self.graph, "time")  # type: ignore[assignment]
        for node, dim in zip(inputs, self.time_dims, strict=True):
            if dim:
                self.values[node] = self.graph.call_method("movedim", (self.values[node], dim, 0))
            self.values[node].meta.update(node.meta)
        self.first_carrier = carriers[0] if carriers else None

    def state_of(self, slots: Sequence[str]) -> Any:
        return None

    def steps(self) -> Node:
        if self.time is None:
            assert self.first_carrier is not None
            self.time = self.graph.call_function(time_steps, (self.values[self.first_carrier],))
        return self.time

    def emit(self) -> Emitted:
        self.placeholders()
        for region in self.program.regions:
            self.emit_region(region)
        outputs = [self.for_the_caller(v, self._time_back(self.returned(v))) for v in self.program.outputs]
        self.graph.output(pytree.tree_unflatten(outputs, self.program.output_spec))
        return Emitted(self.graph, self.regions)

    def _time_back(self, value: Any) -> Any:
        if isinstance(value, Node) and self.output_time_dim != 0 and self.reduce is None:
            return self.graph.call_method("movedim", (value, 0, self.output_time_dim))
        return value
