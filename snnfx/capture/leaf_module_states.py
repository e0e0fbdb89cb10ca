"""The states of stateful leaves as the rest of the model sees them: `self.lif.v`, read and written from outside.

A call of a leaf is one node with explicit state, so while a step is recorded nothing keeps the leaf's own attributes up
to date. Here they are made to hold the current value of each slot: what the model reads from them is recorded, and what
it writes becomes the value that the next call, or the next step, starts from.

A state that is looked at before the first call of its leaf may decide what Python does (`if self.lif.v is None`). Such
leaves are traced cold with their reset values, like the modules that are traced through.
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
    """The module and the attribute behind each slot of a leaf, in the order of its slots."""
    if isinstance(adapter, CompositeAdapter):
        return [pair for _, part, inner in adapter.parts for pair in owners(part, inner)]
    return [(module, name) for name in adapter.names(module)]


class LeafModuleStates:
    """Shows the slots of leaves in their attributes while one step is recorded.

    Attributes:
        met_early: names of leaves whose state was read or written before they were called.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.met_early: set[str] = set()
        self._shown: dict[str, Any] = {}
        self._untouched: dict[tuple[nn.Module, str], str] = {}
        self._raw: set[str] = set()
        self._bound: set[str] = set()
        self._starts: dict[str, Any] = {}
        self._is_ours = False

    def begin(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Show what reads the slots of a leaf."""
        self._untouched.update(dict.fromkeys(owners(module, adapter), name))
        self.show(name, module, adapter)

    def begin_with_reset_values(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Show the reset values of a leaf; its slots are then not read by anything."""
        slots = _slots(name, module, adapter)
        with self._unnoticed():
            adapter.reset(module)
            values = adapter.read(module)
        self._raw.update(slots)
        self._shown.update(zip(slots, values, strict=True))
        self.recorder.slot_values.update(self._shown)

    def bind(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Leave the initial values of a leaf to the comparison of the cold trace with the warm one."""
        self._bound.update(_slots(name, module, adapter))

    def note_read(self, module: nn.Module, attribute: str) -> None:
        """Notice that the model's code looks at an attribute of a module."""
        if self._untouched and not self._is_ours and not self.recorder.is_evaluating:
            name = self._untouched.get((module, attribute))
            if name is not None:
                self.met_early.add(name)

    def takes_initial(self, slot: str) -> bool:
        """Whether a node that computes the initial value of the slot is wanted at the first call of its leaf."""
        return slot in self._raw if slot in self._bound else slot not in self.recorder.slot_initials

    def set_initial(self, slot: str, initial: StepProxy) -> None:
        """Take that node: for the slot, or as what a leaf with reset values starts from."""
        (self._starts if slot in self._bound else self.recorder.slot_initials)[slot] = initial

    def before_call(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Take what was written since the last call."""
        self.collect(name, module, adapter)
        for slot in self._raw.intersection(_slots(name, module, adapter)):
            self.recorder.slot_values[slot] = self._starts[slot]
        self.call(name, module, adapter)

    def call(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """From here on the state of a leaf is a result of the step."""
        self._raw.difference_update(_slots(name, module, adapter))
        for owner in owners(module, adapter):
            self._untouched.pop(owner, None)

    def show(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """Give the attributes of a leaf the current values of its slots."""
        slots = _slots(name, module, adapter)
        with self._unnoticed():
            adapter.write(module, [self.recorder.slot_values[slot] for slot in slots])
            self._shown.update(zip(slots, adapter.read(module), strict=True))

    def collect(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        """What has been written to the attributes of a leaf becomes the value of its slots."""
        with self._unnoticed():
            values = adapter.read(module)
        for slot, value, owner in zip(_slots(name, module, adapter), values, owners(module, adapter), strict=True):
            if value is self._shown[slot]:
                continue
            is_called = owner not in self._untouched
            if not is_called:
                self.met_early.add(name)
            # A module that is stepped as it is takes a number as well.
            is_number_for_it = is_number(value) and isinstance(adapter, CompositeAdapter) and not is_called
            self.recorder.slot_values[slot] = value if is_number_for_it else self._as_tensor(slot, value)
            self._shown[slot] = value
            self._raw.discard(slot)

    def _as_tensor(self, slot: str, value: Any) -> Any:
        if isinstance(value, StepProxy | Tensor):
            return value
        like = self._starts.get(slot) if slot in self._raw else self.recorder.slot_values[slot]
        if is_number(value) and type(like) is StepProxy:
            return self.recorder.create_proxy("call_function", torch.full_like, (like, value), {})
        raise CaptureError(
            "SNNFX217",
            f"the state `{slot}` is set to {value!r} in a step",
            where=format_location(user_location()) or location_of_forward(self.recorder.root),
            why="the state of a neuron is a tensor at every step of a net.",
            hint="Assign a tensor, e.g. torch.zeros_like(...); every call of a net starts from the reset state anyway.",
        )

    @contextlib.contextmanager
    def _unnoticed(self) -> Iterator[None]:
        before, self._is_ours = self._is_ours, True
        try:
            yield
        finally:
            self._is_ours = before


def _slots(name: str, module: nn.Module, adapter: Adapter) -> list[str]:
    return [f"{name}.{slot}" if name else slot for slot in adapter.names(module)]
