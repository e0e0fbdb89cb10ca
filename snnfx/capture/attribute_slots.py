"""State in plain module attributes: detect that a step changes it, and use it as a slot."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.capture.proxy import StepProxy
from snnfx.capture.read_tracking_list import ReadTrackingList
from snnfx.errors import CaptureError
from snnfx.ir.facts import VALUE
from snnfx.sandbox.pytree_paths import flatten_with_path
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import location_of_forward

__all__ = [
    "AttributeSlot",
    "changed_elements",
    "is_number",
    "is_state_change",
    "known_value",
    "recorded",
]


@dataclass
class AttributeSlot:
    """A slot for a plain attribute (or an element of a container) that a step changes.

    Args:
        name: name of the slot.
        module, attribute: the module and its attribute.
        before: the value before the step.
        after: the fake value after the step, or None if it is unknown.
        result: the value after the step: a proxy, node, tensor or number.
        container: for an element of a container, the container after the step.
        path: pytree path of the element in the container.
    """

    name: str
    module: nn.Module
    attribute: str
    before: Any
    after: Any
    result: Any
    container: Any = None
    path: tuple[Any, ...] = ()
    start: Any = None
    """The value of the whole attribute before the step, MISSING if it did not exist."""
    grows: bool = False
    """Whether a step extends the container although its state already exists."""
    is_watched: bool = False
    """Whether to detect reads of a container that grows."""

    def final_node(self) -> Any:
        """The node of the value after the step, or the value itself."""
        return self.result.node if type(self.result) is StepProxy else self.result

    def write(self, value: Any) -> None:
        """Set the attribute, or the element of the container, to `value`."""
        if self.path:
            leaves, spec = flatten_with_path(self._current())
            if spec != pytree.tree_structure(self.container):
                leaves, spec = flatten_with_path(self.container)
            value = pytree.tree_unflatten([value if path == self.path else leaf for path, leaf in leaves], spec)
            if self.is_watched and type(value) is list:
                value = ReadTrackingList(value)
        self.module.__dict__[self.attribute] = value

    def read(self, initial: StepProxy) -> Any:
        """The value after the step that started with `initial`.

        Raises:
            CaptureError: SNNFX201, the structure of the container changes in each step.
        """
        if not self.path:
            return self._current()
        if self.keeps_structure():
            return dict(flatten_with_path(self._current())[0])[self.path]
        container = self._stored()
        self.grows = True
        is_unread = isinstance(container, ReadTrackingList) and not container.was_read
        if initial.node.users or (self.is_watched and not is_unread):
            raise self.refusal()
        return initial  # a list that only logs values grows, but the step never reads it

    def refusal(self) -> CaptureError:
        """The error for a container whose structure changes in each step."""
        return CaptureError(
            "SNNFX201",
            f"`{self.attribute}` of {type(self.module).__name__} changes its structure in each step",
            where=location_of_forward(self.module),
            why="it contains state, and a net must have the same states at every step.",
            hint="Keep a fixed number of tensors in it, or register them with snnfx.MemoryModule.register_memory. For "
            "a log, return the value, or append it to a list that is an attribute of the module.",
        )

    def keeps_structure(self) -> bool:
        """Whether the container has the structure that it had when its state was discovered."""
        return bool(pytree.tree_structure(self._current()) == pytree.tree_structure(self.container))

    def _current(self) -> Any:
        value = self._stored()
        return value.plain() if isinstance(value, ReadTrackingList) else value

    def _stored(self) -> Any:
        return self.module.__dict__.get(self.attribute)


def is_state_change(old: Any, new: Any) -> bool:
    """Whether a change from `old` to `new` can be a slot: a recorded value, a new tensor or another number."""
    if type(new) is StepProxy:
        return True
    if is_number(new) and (old is None or is_number(old)):
        return bool(old != new)
    return isinstance(new, Tensor) and new is not old and (old is None or is_number(old) or isinstance(old, Tensor))


def changed_elements(slot: str, module: nn.Module, key: str, old: Any, new: Any) -> Iterator[AttributeSlot]:
    """Yield a slot for each element of a tuple, list or dict that a step changes."""
    if isinstance(new, ReadTrackingList):
        new = new.plain()
    before = dict(flatten_with_path(old)[0])
    new = pytree.tree_map(lambda leaf: leaf, new)  # a copy, because the trace restores the model's own list
    for path, value in flatten_with_path(new)[0]:
        if is_state_change(before.get(path), value):
            name = slot + "".join(f".{getattr(k, 'idx', getattr(k, 'key', getattr(k, 'name', k)))}" for k in path)
            yield AttributeSlot(name, module, key, before.get(path), recorded(value), value, new, path)


def is_number(value: Any) -> bool:
    """Whether a value is a Python number, a bool or a NumPy integer, not a proxy.

    NumPy floats of other precisions than Python's are not: steps would round them differently.
    """
    kind: Any = type(value)
    return isinstance(value, bool | int | float | numbers.Integral) and kind is not StepProxy


def recorded(value: Any) -> Any:
    """The fake value of a proxy or node, or None if it is unknown."""
    if type(value) is StepProxy:
        return VALUE.of(value.node)
    if isinstance(value, Node):
        return VALUE.of(value)
    return None


def known_value(value: Any) -> tuple[Any, ...]:
    """The optional `value` argument of `StepTracer.add_slot`: empty if the value is unknown."""
    return () if value is None else (value,)
