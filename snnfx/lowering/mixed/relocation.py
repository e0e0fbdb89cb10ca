"""Point the operations of a compiled loop to other memory, without building them again.

A kept run is built on stand-ins: tensors with the shapes and strides of the given tensors and of the results. Only the
addresses in the structs of its operations depend on where these tensors are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["Relocation", "start_of"]


def start_of(tensor: Tensor) -> int:
    """The address of the storage of a tensor."""
    return tensor.untyped_storage().data_ptr()


class Relocation:
    """The addresses of stand-ins in the structs of a loop.

    Args:
        rings: the structs whose member `data` is an address.
        stand_ins: one tensor of each storage that is moved.
    """

    def __init__(self, rings: Iterable[Any], stand_ins: Iterable[Tensor]) -> None:
        ranges = [(start_of(t), t.untyped_storage().nbytes()) for t in stand_ins]
        self._places: dict[int, list[tuple[Any, int]]] = {start: [] for start, _ in ranges}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        for ring in rings:
            address = ring.data
            for start, size in ranges:
                if start <= address < start + size:
                    self._places[start].append((ring, address))

    def move(self, stand_in: Tensor, tensor: Tensor) -> None:
        """Use the memory of a tensor for a stand-in with the same shape, strides and dtype."""
        start, distance = start_of(stand_in), tensor.data_ptr() - stand_in.data_ptr()
        if not start:  # it has no elements
            return
        for ring, address in self._places[start]:
            ring.data = address + distance
        self._moved[start] = stand_in, tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor at the place of a view of a stand-in; any other tensor is returned."""
        found = self._moved.get(start_of(tensor))
        if found is None:
            return tensor
        stand_in, moved = found
        if tensor is stand_in:
            return moved
        distance = (tensor.data_ptr() - stand_in.data_ptr()) // tensor.element_size()
        return moved.as_strided(tensor.shape, tensor.stride(), moved.storage_offset() + distance)

    def release(self) -> None:
        """Drop the references to the tensors of the latest call."""
        self._moved.clear()
