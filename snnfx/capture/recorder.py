"""The interface of the tracer that its helper modules use."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from torch.fx import Node

from snnfx.capture.proxy import StepProxy

__all__ = ["Recorder"]


class Recorder(Protocol):
    """Records nodes of one time step and stores the values of its slots; `StepTracer` implements it.

    Attributes:
        root: the model.
        is_evaluating: whether Python runs on example values, so that nothing is recorded.
        constants: objects that the graph uses and the model does not register, by the name of their `get_attr` node.
        slot_values: the current value of each slot.
        slot_initials: the node that computes the initial value of a slot, where there is one.
        slot_placeholders: the placeholder of each slot.
        overwritten_slots: slots whose stored value a call ignored because the caller passed the state as an argument.
        carried_arguments: the value of each argument that carries state across steps.
        first_reads: the value of each module attribute when the model's code first read it.
        user_reads: the module attributes that the model's code reads, including absent ones and submodules.
    """

    root: nn.Module
    is_evaluating: bool
    constants: dict[str, Any]
    slot_values: dict[str, Any]
    slot_initials: dict[str, Any]
    slot_placeholders: dict[str, Node]
    overwritten_slots: set[str]
    carried_arguments: dict[str, Any]
    first_reads: dict[tuple[nn.Module, str], Any]
    user_reads: dict[tuple[nn.Module, str], None]

    def proxy(self, node: Node) -> StepProxy:
        """The proxy of a node."""

    def constant(self, value: Any) -> Node:
        """Record a `get_attr` node for an object that the model does not register."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a node and return its proxy."""

    def record_at(self, name: str, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepProxy:
        """Record a node that belongs to the module called `name`."""

    def is_without_gradient(self) -> bool:
        """Whether the model's code has disabled gradients."""

    def without_gradient(self, proxy: Any) -> Any:
        """Record the detached value, as an operation under `torch.no_grad()` returns it."""
