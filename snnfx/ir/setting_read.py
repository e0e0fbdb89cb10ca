"""A Python value of the model that a captured step depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SettingRead:
    """An attribute that the code of the model read during capture.

    Args:
        owner: qualified name of the module, "" for the model itself.
        name: name of the attribute.
        value: its value at capture; for a list, dict or settings object, its contents.
        shown: the value in printed form.
    """

    owner: str
    name: str
    value: Any
    shown: str

    @property
    def qualified_name(self) -> str:
        """Owner and attribute, e.g. `lif1.tau`."""
        return f"{self.owner}.{self.name}" if self.owner else self.name
