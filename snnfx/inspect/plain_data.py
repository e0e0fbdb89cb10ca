"""Reports as dicts, lists, strings and numbers, ready for `json.dumps`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["plain_data"]


def plain_data(report: Any) -> dict[str, Any]:
    """Convert a dataclass to plain data: tuples become lists, other types without a JSON form become strings."""
    return _plain(dataclasses.asdict(report))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
