"""The base class of passes: one transformation of a step program."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from snnfx.ir.program import StepProgram

__all__ = ["Pass"]


@dataclass(frozen=True)
class Pass:
    """One transformation of a step program, a frozen dataclass whose fields are its options.

    A subclass sets `name`, the stage that it `requires` and, if it reaches another one, the stage that it `ensures`. It
    implements `apply`, which changes the program and returns a short note about the changes.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[str] = "captured"
    ensures: ClassVar[str | None] = None

    def apply(self, program: StepProgram) -> str:
        """Change `program`; return a note such as "removed 3 nodes"."""
        raise NotImplementedError

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name
