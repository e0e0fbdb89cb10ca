"""Access to the states of stateful leaf modules from outside, such as `self.lif.v` in the model's forward.

A call of a leaf module is one node with explicit state, so the call does not update the attributes of the module during
a trace. `LeafModuleStates` sets them to the current value of each slot. A read from them is therefore recorded, and a
value written to them becomes the state of the next call or the next step.

If the model reads a state before the first call of its leaf module, Python control flow may depend on it
(`if self.lif.v is None`). The cold trace then uses the reset values of the module, as it does for traced modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.capture.attribute_slots import is_number
from snnfx.capture.proxy import StepProxy
from snnfx.capture.recorder import Recorder
from snnfx.errors import CaptureError
from snnfx.sandbox.user_code import format_location, location_of_forward, user_location
from snnfx.state.composite_adapter import CompositeAdapter
from snnfx.state.stateful import Adapter

__all__ = ["LeafModuleStates", "owners"]


def owners(module: nn.Module, adapter: Adapter) -> list[tuple[nn.Module, str]]:
    """The module and the attribute of each slot of a leaf module, in the order of its slots."""
    if isinstance(adapter, CompositeAdapter):
        return [pair for _, part, part_adapter in adapter.parts for pair in owners(part, part_adapter)]
    return [(module, name) for name in adapter.names(module)]


class LeafModuleStates:
    """Synchronizes the attributes of leaf modules with their slots during a trace.

    Attributes:
        accessed_before_call: names of leaf modules whose state was read or written before their first call.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.accessed_before_call: set[str] = set()
        self._attribute_values: dict[str, Any] = {}
        self._owners_before_call: dict[tuple[nn.Module, str], str] = {}
        self._slots_at_reset_value: set[str] = set()
        self._matched_slots: set[str] = set()
        self._initial_nodes: dict[str, Any] = {}
        self._is_internal_access = False

    def start_from_placeholders(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Set the attributes of a leaf module to the placeholders of its slots."""
        self._owners_before_call.update(dict.fromkeys(owners(module, adapter), name))
        self.write_attributes(name, module, adapter)

    def start_from_reset_values(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Set the attributes of a leaf module to its reset values, so that nothing reads its placeholders."""
        slots = _slot_names(name, module, adapter)
        with self._internal_access():
            adapter.reset(module)
            values = adapter.read(module)
        self._slots_at_reset_value.update(slots)
        self._attribute_values.update(zip(slots, values, strict=True))
        self.recorder.slot_values.update(self._attribute_values)

    def match_initial_values(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Let the comparison of the cold and the warm trace determine the initial values of a leaf module."""
        self._matched_slots.update(_slot_names(name, module, adapter))

    def note_read(self, module: nn.Module, attribute: str) -> None:
        """Record that the model's code reads an attribute of a module."""
        if self._owners_before_call and not self._is_internal_access and not self.recorder.is_evaluating:
            name = self._owners_before_call.get((module, attribute))
            if name is not None:
                self.accessed_before_call.add(name)

    def needs_initial(self, slot: str) -> bool:
        """Whether the next call of a leaf module needs a node that computes the initial value of the slot."""
        if slot in self._slots_at_reset_value:
            return True
        return slot not in self._matched_slots and slot not in self.recorder.slot_initials

    def set_initial(self, slot: str, initial: StepProxy) -> None:
        """Store the node that computes the initial value of a slot."""
        is_of_reset = slot in self._matched_slots or slot in self.recorder.slot_initials
        (self._initial_nodes if is_of_reset else self.recorder.slot_initials)[slot] = initial

    def before_call(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Update the slots of a leaf module from its attributes before a call."""
        self.read_attributes(name, module, adapter)
        for slot in self._slots_at_reset_value.intersection(_slot_names(name, module, adapter)):
            self.recorder.slot_values[slot] = self._initial_node(slot)
        self.mark_called(name, module, adapter)

    def mark_called(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Note that a leaf module is called, so that its state is now a result of the step."""
        self._slots_at_reset_value.difference_update(_slot_names(name, module, adapter))
        for owner in owners(module, adapter):
            self._owners_before_call.pop(owner, None)

    def write_attributes(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Set the attributes of a leaf module to the current values of its slots."""
        slots = _slot_names(name, module, adapter)
        with self._internal_access():
            adapter.write(module, [self.recorder.slot_values[slot] for slot in slots])
            self._attribute_values.update(zip(slots, adapter.read(module), strict=True))

    def read_attributes(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Set the slots of a leaf module to the values that the model wrote to its attributes."""
        with self._internal_access():
            values = adapter.read(module)
        for slot, value, owner in zip(_slot_names(name, module, adapter), values, owners(module, adapter), strict=True):
            if value is self._attribute_values[slot]:
                continue
            is_called = owner not in self._owners_before_call
            if not is_called:
                self.accessed_before_call.add(name)
            # An opaque module accepts a number as well.
            may_stay_number = is_number(value) and isinstance(adapter, CompositeAdapter) and not is_called
            if self._is_reset_value(value, slot, name, module, adapter):
                self._slots_at_reset_value.add(slot)
                self._attribute_values[slot] = value
                self.recorder.slot_values[slot] = self._initial_node(slot) or self.recorder.slot_values[slot]
                continue
            self.recorder.slot_values[slot] = value if may_stay_number else self._as_tensor(slot, value)
            self._attribute_values[slot] = value
            self._slots_at_reset_value.discard(slot)

    def _is_reset_value(self, value: Any, slot: str, name: str, module: nn.Module, adapter: Adapter) -> bool:
        """Whether `functional.reset_net(self)` in a forward set a state to another value than a tensor."""
        if isinstance(value, StepProxy | Tensor) or is_number(value):
            return False
        index = _slot_names(name, module, adapter).index(slot)
        if isinstance(adapter, CompositeAdapter):
            with self._internal_access():
                return value is None and adapter.initial(module)[index] is None
        is_reset_value = getattr(adapter, "is_reset_value", None)
        return is_reset_value is not None and is_reset_value(module, adapter.names(module)[index], value)

    def _initial_node(self, slot: str) -> Any:
        return self._initial_nodes.get(slot, self.recorder.slot_initials.get(slot))

    def _as_tensor(self, slot: str, value: Any) -> Any:
        if isinstance(value, StepProxy | Tensor):
            return value
        is_reset = slot in self._slots_at_reset_value
        template = self._initial_nodes.get(slot) if is_reset else self.recorder.slot_values[slot]
        if is_number(value) and type(template) is StepProxy:
            return self.recorder.create_proxy("call_function", torch.full_like, (template, value), {})
        raise CaptureError(
            "SNNFX217",
            f"a step sets the state `{slot}` to {value!r}",
            where=format_location(user_location()) or location_of_forward(self.recorder.root),
            why="in a net the state of a neuron is a tensor at every step.",
            hint="Assign a tensor, e.g. torch.zeros_like(...). A reset is not needed: each call of a net starts from "
            "the reset state.",
        )

    @contextlib.contextmanager
    def _internal_access(self) -> Iterator[None]:
        before, self._is_internal_access = self._is_internal_access, True
        try:
            yield
        finally:
            self._is_internal_access = before


def _slot_names(name: str, module: nn.Module, adapter: Adapter) -> list[str]:
    return [f"{name}.{slot}" if name else slot for slot in adapter.names(module)]
