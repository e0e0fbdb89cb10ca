"""A plain Python value of the model that a captured step depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SettingRead:
    """An attribute that the model's code read while a step was captured.

    Args:
        owner: qualified name of the module, "" for the model itself.
        name: the attribute.
        value: what it was; of a list, dict or settings object, what is in it.
        shown: the value as it prints.
    """

    owner: str
    name: str
    value: Any
    shown: str

    @property
    def qualified_name(self) -> str:
        """`lif1.tau`."""
        return f"{self.owner}.{self.name}" if self.owner else self.name
