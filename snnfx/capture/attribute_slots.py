"""Attributes that a step changes: how they are noticed, and how a trace reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.capture.proxy import StepProxy
from snnfx.capture.read_tracking_list import ReadTrackingList
from snnfx.errors import CaptureError
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import location_of_forward

__all__ = [
    "AttributeSlot",
    "changed_elements",
    "is_number",
    "is_state_change",
    "known_value",
    "recorded",
    "versions",
]


@dataclass
class AttributeSlot:
    """A plain attribute (or buffer) that a step changes."""

    name: str
    module: nn.Module
    attribute: str
    before: Any
    after: Any
    result: Any
    container: Any = None
    path: tuple[Any, ...] = ()
    start: Any = None
    """What the whole attribute held before the step, MISSING if it was not there."""
    grows: bool = False
    """Whether a step was seen to make the container longer although it had its state already."""
    is_watched: bool = False
    """Whether to find out if anybody looks at such a container."""

    def final_node(self) -> Any:
        return self.result.node if type(self.result) is StepProxy else self.result

    def write(self, value: Any) -> None:
        if self.path:
            leaves, spec = pytree.tree_flatten_with_path(self._current())
            if spec != pytree.tree_structure(self.container):
                leaves, spec = pytree.tree_flatten_with_path(self.container)
            value = pytree.tree_unflatten([value if path == self.path else leaf for path, leaf in leaves], spec)
            if self.is_watched and type(value) is list:
                value = ReadTrackingList(value)
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = value
        else:
            self.module.__dict__[self.attribute] = value

    def read(self, written: StepProxy) -> Any:
        """The value after the step that began with `written`."""
        if not self.path:
            return self._current()
        if self.keeps_structure():
            return dict(pytree.tree_flatten_with_path(self._current())[0])[self.path]
        now = self._stored()
        self.grows = True
        if written.node.users or (self.is_watched and not (isinstance(now, ReadTrackingList) and not now.was_read)):
            raise self.refusal()
        return written  # a list that notes something down for somebody else grows; nothing reads it

    def refusal(self) -> CaptureError:
        """The error of a container that is nested in another way after each step."""
        return CaptureError(
            "SNNFX201",
            f"`{self.attribute}` of {type(self.module).__name__} has another structure after each step",
            where=location_of_forward(self.module),
            why="it holds state, and a net has the same states at every step.",
            hint="Keep a fixed number of tensors in it, or register them with snnfx.MemoryModule.register_memory.",
        )

    def keeps_structure(self) -> bool:
        """Whether the container is nested as it was after the step that showed it to be state."""
        return bool(pytree.tree_structure(self._current()) == pytree.tree_structure(self.container))

    def _current(self) -> Any:
        value = self._stored()
        return value.plain() if isinstance(value, ReadTrackingList) else value

    def _stored(self) -> Any:
        if self.attribute in self.module._buffers:
            return self.module._buffers[self.attribute]
        return self.module.__dict__.get(self.attribute)


def versions(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The buffers of a module and the tensors in its plain attributes, with the number of changes they have seen."""
    named = {**module.__dict__, **module._buffers}
    return {k: (v, v._version) for k, v in named.items() if type(v) is not StepProxy and isinstance(v, Tensor)}


def is_state_change(old: Any, new: Any) -> bool:
    if type(new) is StepProxy:
        return True
    if is_number(new) and (old is None or is_number(old)):
        return bool(old != new)
    return isinstance(new, Tensor) and new is not old and (old is None or is_number(old) or isinstance(old, Tensor))


def changed_elements(slot: str, module: nn.Module, key: str, old: Any, new: Any) -> Iterator[AttributeSlot]:
    """State that is kept in a tuple, a list or a dict: one slot for each element that a step changes."""
    if isinstance(new, ReadTrackingList):
        new = new.plain()
    before = dict(pytree.tree_flatten_with_path(old)[0])
    new = pytree.tree_map(lambda leaf: leaf, new)  # a copy: the model's own list is put back after the trace
    for path, value in pytree.tree_flatten_with_path(new)[0]:
        if is_state_change(before.get(path), value):
            name = slot + "".join(f".{getattr(k, 'idx', getattr(k, 'key', getattr(k, 'name', k)))}" for k in path)
            yield AttributeSlot(name, module, key, before.get(path), recorded(value), value, new, path)


def is_number(value: Any) -> bool:
    kind: Any = type(value)
    return isinstance(value, bool | int | float) and kind is not StepProxy


def recorded(value: Any) -> Any:
    """The fake value behind a proxy or node, or None."""
    if type(value) is StepProxy:
        return value.node.meta.get("val")
    if isinstance(value, Node):
        return value.meta.get("val")
    return None


def known_value(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,)
