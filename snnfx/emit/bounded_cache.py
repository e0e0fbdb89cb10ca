"""A cache that drops the least recently used entries."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

__all__ = ["BoundedCache"]

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Values by key; a full cache drops the values that were not used for longest.

    Args:
        limit: the largest number of values.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: dict[Hashable, V] = {}

    def values(self) -> list[V]:
        """The values, the least recently used first."""
        return list(self._values.values())

    def get(self, key: Hashable) -> V | None:
        """The value of a key, which becomes the most recently used; None if there is none."""
        value = self._values.get(key)
        if value is not None and not torch.compiler.is_compiling():
            self._values.pop(key, None)
            self._values[key] = value
        return value

    @property
    def is_filled(self) -> bool:
        """Whether there is any value."""
        return bool(self._values)

    def peek(self, key: Hashable) -> V | None:
        """The value of a key, without making it the most recently used; None if there is none."""
        return self._values.get(key)

    def drop(self, key: Hashable) -> None:
        """Remove a key."""
        self._values.pop(key, None)

    def get_or_make(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key; a missing value is made and stored."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Store a value."""
        self._values[key] = value
        for oldest in list(self._values)[: -self.limit]:
            self._values.pop(oldest, None)
