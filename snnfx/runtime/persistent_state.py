"""Persistent state: buffers and parameters that the steps of a model change, read before a call and written after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.ir.program import Slot

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

    def without(self, state: State | None) -> State | None:
        """A state without the values that start from the model; None if no others are left."""
        if state is None or not self._places:
            return state
        return {name: value for name, value in state.items() if name not in self.names} or None


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

    def start(self) -> Tensor:
        tensor: Tensor = self.registry[self.attribute].detach()
        return tensor if self.is_replaced else tensor.clone()

    def write(self, value: Tensor) -> None:
        target: Tensor = self.registry[self.attribute]
        with torch.inference_mode(not self.is_replaced and target.is_inference()), torch.no_grad():
            if self.is_replaced:
                # A copy: the value may be a view of a whole sequence, and outside inference mode it can be trained.
                self.registry[self.attribute] = value.detach().clone()
            else:
                # Through the tensor itself: its aliases follow, and autograd notices a graph that saved it.
                target.copy_(value)
