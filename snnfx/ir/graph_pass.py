"""The base class of passes: one transformation of a step program."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from snnfx.ir.program import StepProgram

__all__ = ["Pass"]


@dataclass(frozen=True)
class Pass:
    """One transformation of a step program.

    Subclasses set `name`, the stage they `require` and, if they reach one, the stage they `ensure`, and implement
    `apply`, which changes the program and returns a short note of what it did.
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
