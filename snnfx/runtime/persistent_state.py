"""Persistent state: buffers and parameters that steps change; read before a call and written after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.ir.program import Slot
from snnfx.sandbox.tensor_values import value_restorer

__all__ = ["PersistentState"]

State = dict[str, Any]


class PersistentState:
    """Reads and writes the buffers and parameters that the persistent slots of a program are.

    Args:
        source: the model.
        slots: the persistent slots.
    """

    def __init__(self, source: nn.Module, slots: Iterable[Slot]) -> None:
        self._places = [_Place.of(source, slot) for slot in slots]
        self._written: dict[str, tuple[Tensor, int]] = {}
        self.names = frozenset(place.name for place in self._places)

    def starts(self) -> State:
        """The value of each slot before a call, without a graph.

        A copy where the call changes the tensor in place, so that this invalidates nothing that autograd saved.
        """
        return {place.name: place.start() for place in self._places}

    def is_reset(self, state: State | None) -> bool:
        """Whether a state has no values besides persistent ones, so that the others start from the reset state."""
        return state is None or self.names.issuperset(state)

    def write(self, state: State) -> None:
        """Write the final values of a call to the model."""
        for place in self._places:
            place.write(state[place.name])

    def snapshot(self) -> list[Callable[[], None]]:
        """Functions that restore the tensors and values of now, for steps that run again later."""
        return [place.restorer() for place in self._places]

    def remember(self, keep_graph: bool) -> None:
        """Remember that the model has the values of the last call now.

        Args:
            keep_graph: the next call may take the values with their autograd graphs from the state, so that gradients
                flow from step to step.
        """
        self._written = {}
        if keep_graph and not torch.compiler.is_compiling():
            self._written = {place.name: place.tensor_and_version() for place in self._places}

    def carried(self, state: State | None) -> State | None:
        """A state without the values that start from the model: all, except those that the model still has.

        Returns:
            None if no value is left.
        """
        if state is None or not self._places:
            return state
        stale = {p.name for p in self._places if not p.is_unchanged(self._written.get(p.name))}
        return {name: value for name, value in state.items() if name not in stale} or None


@dataclass(frozen=True)
class _Place:
    """The module and the attribute that store the tensor of a persistent slot."""

    name: str
    registry: dict[str, Any]
    attribute: str
    is_replaced: bool

    @staticmethod
    def of(source: nn.Module, slot: Slot) -> _Place:
        owner, _, attribute = slot.name.rpartition(".")
        module = source.get_submodule(owner)
        registry = module._buffers if attribute in module._buffers else module._parameters
        return _Place(slot.name, registry, attribute, slot.persistent == "assigned")

    def tensor_and_version(self) -> tuple[Tensor, int]:
        """The tensor, and the number of its in-place changes so far."""
        tensor: Tensor = self.registry[self.attribute]
        return tensor, -1 if tensor.is_inference() else tensor._version

    def restorer(self) -> Callable[[], None]:
        """A function that restores the tensor and its value of now."""
        tensor: Tensor = self.registry[self.attribute]
        restore_value = value_restorer(tensor)

        def restore() -> None:
            self.registry[self.attribute] = tensor
            restore_value()

        return restore

    def is_unchanged(self, before: tuple[Tensor, int] | None) -> bool:
        """Whether the tensor is the same, without changes since `before`."""
        if before is None:
            return False
        tensor, version = self.tensor_and_version()
        return tensor is before[0] and version == before[1]

    def start(self) -> Tensor:
        tensor: Tensor = self.registry[self.attribute].detach()
        return tensor if self.is_replaced else tensor.clone()

    def write(self, value: Tensor) -> None:
        target: Tensor = self.registry[self.attribute]
        if torch.compiler.is_compiling():  # outside inference mode, which is not compiled
            with torch.no_grad():
                if self.is_replaced:
                    self.registry[self.attribute] = value.detach().clone()
                else:
                    target.copy_(value)
            return
        with torch.inference_mode(not self.is_replaced and target.is_inference()), torch.no_grad():
            if self.is_replaced:
                # A copy: the value may be a view of a whole sequence, and outside inference mode it can be trained.
                self.registry[self.attribute] = value.detach().clone()
            else:
                # Through the tensor itself: its aliases follow, and autograd notices a graph that saved it.
                target.copy_(value)
