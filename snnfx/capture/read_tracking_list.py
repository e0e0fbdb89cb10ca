"""A list that detects reads: a list that grows in every step and is never read is not state."""

from __future__ import annotations

from typing import Any

__all__ = ["ReadTrackingList"]


class ReadTrackingList(list[Any]):
    """Replaces a growing list during a trace; `was_read` tells whether the step read from it."""

    was_read = False

    def plain(self) -> list[Any]:
        """An ordinary list with the same elements."""
        return list(list.__iter__(self))

    def __add__(self, other: Any) -> Any:
        result = ReadTrackingList([*self.plain(), *other])
        result.was_read = self.was_read
        return result


def _tracked(name: str) -> Any:
    original = getattr(list, name)

    def read(self: ReadTrackingList, *args: Any, **kwargs: Any) -> Any:
        self.was_read = True
        return original(self, *args, **kwargs)

    return read


for _name in "__len__ __iter__ __getitem__ __contains__ __reversed__ __eq__ __mul__ index count copy pop".split():
    setattr(ReadTrackingList, _name, _tracked(_name))
