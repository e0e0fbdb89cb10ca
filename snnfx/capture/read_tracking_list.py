"""A list that notes whether anybody looks at it: one that grows in every step is no state as long as nobody does."""

from __future__ import annotations

from typing import Any

__all__ = ["ReadTrackingList"]


class ReadTrackingList(list[Any]):
    """Stands for a list that every step makes longer, while a step is recorded to find out."""

    was_read = False

    def plain(self) -> list[Any]:
        return list(list.__iter__(self))

    def __add__(self, other: Any) -> Any:
        both = ReadTrackingList([*self.plain(), *other])
        both.was_read = self.was_read
        return both


def _noting(name: str) -> Any:
    original = getattr(list, name)

    def read(self: ReadTrackingList, *args: Any, **kwargs: Any) -> Any:
        self.was_read = True
        return original(self, *args, **kwargs)

    return read


for _name in "__len__ __iter__ __getitem__ __contains__ __reversed__ __eq__ __mul__ index count copy pop".split():
    setattr(ReadTrackingList, _name, _noting(_name))
