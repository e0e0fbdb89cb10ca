"""Numbers of calls in emitted graphs, under which their decisions are kept while the process runs."""

from __future__ import annotations

import itertools

__all__ = ["new_site"]

_numbers = itertools.count()


def new_site() -> int:
    """A number for the decisions of a call, unique in this process."""
    return next(_numbers)
