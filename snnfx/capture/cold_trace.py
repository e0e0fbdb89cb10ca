"""The first trace of a capture, which starts from the reset state of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from snnfx.capture.attribute_slots import AttributeSlot
from snnfx.capture.capture_session import CaptureSession
from snnfx.capture.recording_copy import RecordingCopy
from snnfx.capture.tracer import StepTracer
from snnfx.errors import CaptureError
from snnfx.ir.facts import VALUE
from snnfx.ir.printing import location_of
from snnfx.ir.program import InputLeaf, StepProgram, results_of
from snnfx.ops.operator_lookup import traits_of
from snnfx.sandbox.tensor_values import meta_like
from snnfx.sandbox.torch_internals import FakeTensor, pytree

__all__ = ["ColdTrace", "TracedCall", "refer_to_model", "refuse_growth", "refusing_growth"]


@dataclass(frozen=True)
class ColdTrace:
    """A trace from the reset state.

    Args:
        session: the capture.
        leaves, spec: the inputs.
        training: the mode.
        tracer: the tracer with its graph.
        discoveries: the changed attributes.
    """

    session: CaptureSession
    leaves: list[InputLeaf]
    spec: pytree.TreeSpec
    training: bool
    tracer: StepTracer
    discoveries: Sequence[AttributeSlot]

    @classmethod
    def record(
        cls, session: CaptureSession, leaves: list[InputLeaf], spec: pytree.TreeSpec, training: bool
    ) -> ColdTrace:
        """Run the trace."""
        return cls(session, leaves, spec, training, *session.trace({}, warm=False))

    def next_values(self) -> dict[str, Any]:
        """The next value of each slot."""
        return dict(zip(self.tracer.slot_values, results_of(self.tracer.graph)[1], strict=True))

    def start_as_none(self) -> set[str]:
        """The slots of carried arguments that are None at the first step."""
        return {name for c in self.session.carried if not c.required for name in c.argument().slot_names()}

    def suffices(self) -> bool:
        """Whether this trace reads each slot from a placeholder already, so that the capture needs no warm trace."""
        session = self.session
        is_warm = not self.discoveries and not session.matched_slots() and not self.start_as_none()
        return is_warm and session.changes.keep_shapes(self.next_values())

    def program(self) -> StepProgram:
        """The program of a trace that suffices."""
        session = self.session
        return replace(
            refusing_growth(session.program(self.tracer, self.leaves, self.spec, self.training)),
            setting_reads=session.setting_reads(()),
            guards=session.guards(()),
            initial_attributes=session.initial_attributes(()),
        )


@dataclass(frozen=True)
class TracedCall:
    """A trace of a whole call on a copy of the model."""

    trace: ColdTrace
    copy: RecordingCopy

    @property
    def graph(self) -> fx.Graph:
        return self.trace.tracer.graph

    @property
    def mode_matters(self) -> bool:
        """Whether the graph may depend on the mode."""
        return self.copy.training_was_read

    def program(self, training: bool) -> StepProgram | None:
        """The capture of the call; None if it needs more traces.

        Args:
            training: the mode; not the one of the trace only if the mode does not matter.
        """
        if not self.trace.suffices():
            return None
        self.copy.set_mode(training)
        program = replace(self.trace, training=training).program()
        refer_to_model(program, self.copy)
        return program


def refer_to_model(program: StepProgram, copy: RecordingCopy) -> None:
    """Replace the copied objects in a program by those of the user's model, and fake tensors by meta tensors."""
    for captured in filter(None, (program, program.first_step)):
        captured.source = copy.model
        captured.constants = {name: copy.original_of(value) for name, value in captured.constants.items()}
        captured.initial_attributes = [
            replace(a, value=pytree.tree_map(copy.original_of, a.value)) for a in captured.initial_attributes
        ]
        for node in captured.graph.nodes:
            if VALUE.is_known(node):
                values = pytree.tree_map(copy.original_of, VALUE.of(node))
                VALUE.set(node, pytree.tree_map(_as_meta_tensor, values))


def _as_meta_tensor(value: Any) -> Any:
    """Convert a fake tensor to a meta tensor, which belongs to no fake tensor mode."""
    if isinstance(value, FakeTensor | Tensor):
        return meta_like(value)
    return value


def _joins(node: Node, placeholder: str) -> bool:
    """Whether the next value of a slot is its value joined with others."""
    if not traits_of(node).joins:
        return False
    return any(operand.name == placeholder for operand in node.all_input_nodes)


def refusing_growth(program: StepProgram) -> StepProgram:
    """The program, unless a step joins a state with other values."""
    for slot, node in zip(program.slots, program.next_states, strict=True):
        if isinstance(node, Node) and _joins(node, slot.placeholder):
            refuse_growth(slot.name, node, f"`{node.name}` joins it with another value")
    return program


def refuse_growth(name: str, node: Any, why: str) -> None:
    raise CaptureError(
        "SNNFX201",
        f"the state `{name}` grows at each step",
        where=location_of(node) if isinstance(node, Node) else "",
        why=f"{why}; the states of a net have the same shape at every step.",
        hint="Keep the last k values, self.h = torch.cat([self.h, x])[-k:], starting from k values; or return the "
        "value and use the sequence that the net returns.",
    )
