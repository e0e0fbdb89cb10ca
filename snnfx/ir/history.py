"""The history of a net: one record for each pass, with the IR before and after it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from snnfx.ir.program import StepProgram
from snnfx.ir.program_snapshot import ProgramSnapshot

__all__ = ["History", "PassRecord"]

_COLOURS = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"}
_RESET = "\033[0m"


@dataclass(frozen=True)
class PassRecord:
    """The record of one pass.

    Attributes:
        description: the pass with its options.
        milliseconds: the duration of `apply`.
        note: the result of `apply`.
        ir: the printed graph after the pass.
        before: the printed graph before the pass; "" for the first record.
        stage: the stage that the program reached; "emitted" for emitted graphs.
        training: the mode of the program; None for a program of both modes.
    """

    description: str
    milliseconds: float
    note: str
    ir: str = field(repr=False)
    before: str = field(default="", repr=False)
    stage: str = ""
    training: bool | None = None
    snapshot: ProgramSnapshot | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"# {self.description} ({self.milliseconds:.1f} ms): {self.note}"

    @property
    def program(self) -> StepProgram | None:
        """A copy of the step program after the pass; None for an emitted graph."""
        return None if self.snapshot is None else self.snapshot.rebuild()

    def diff(self, colour: bool = False, context: int = 1) -> str:
        """The lines of IR that the pass removed (-) and added (+); the whole IR for the first record.

        Args:
            colour: whether to write ANSI colours.
            context: number of unchanged lines around a change.
        """
        if not self.before:
            return self.ir
        lines = difflib.unified_diff(self.before.splitlines(), self.ir.splitlines(), lineterm="", n=context)
        shown = [line for line in lines if not line.startswith(("---", "+++"))]
        if colour:
            shown = [f"{_COLOURS[line[0]]}{line}{_RESET}" if line[0] in _COLOURS else line for line in shown]
        return "\n".join(shown)

    def report(self, colour: bool = False) -> str:
        """The header of the record and its diff."""
        return f"{self}\n{self.diff(colour) or '  (no line of IR changed)'}\n"


class History(list[PassRecord]):
    """The records of all passes of a net, in order; `print(net.history)` shows what each of them changed."""

    def __str__(self) -> str:
        return "\n".join(record.report() for record in self)

    def passes(self) -> Iterator[PassRecord]:
        """The records of passes on step programs, without those of emitted graphs."""
        return (record for record in self if record.stage != "emitted")

    def last_of_stage(self, stage: str, training: bool) -> PassRecord | None:
        """The last record of a step program at a stage in a mode; None if there is none."""
        found = [record for record in self if record.stage == stage and record.snapshot is not None]
        own = [record for record in found if record.training in (None, training)]
        # Modes that share a program have the records of one mode.
        return next(reversed(own or found), None)

    def on(self, source: nn.Module) -> History:
        """The history of a copy of the net, on the copy of its model."""
        return History(r if r.snapshot is None else replace(r, snapshot=r.snapshot.on(source)) for r in self)
