"""Passes over a step program, and the manager that runs them, verifies between them and keeps the history.

A pass is a frozen dataclass with a `name`; its fields are its options. It says at which stage it takes a program and
which stage it leaves. Between any two passes the program is verified; a pass that breaks it is named, with the node
and the lines of IR around it. With SNNFX_DEBUG=1 in the environment the IR after each pass is printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from snnfx.errors import PassError
from snnfx.ir.graph_pass import Pass
from snnfx.ir.program import STAGES, StepProgram
from snnfx.ir.verifier import verify_program

__all__ = ["PassManager", "PassRecord"]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its description, the time it took in milliseconds, its note, and the IR after it."""

    description: str
    milliseconds: float
    note: str
    ir: str

    def __str__(self) -> str:
        return f"# {self.description} ({self.milliseconds:.1f} ms): {self.note}"


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order.

    Args:
        passes: the pipeline.
        verify: check the program between passes.
    """

    passes: Sequence[Pass]
    verify: bool = True

    def run(self, program: StepProgram, history: list[PassRecord] | None = None) -> list[PassRecord]:
        """Apply all passes to `program` in place.

        Returns:
            The history, one record a pass.

        Raises:
            PassError: a pass is asked for at the wrong stage (SNNFX502) or left the graph invalid (SNNFX501).
        """
        history = history if history is not None else []
        for item in self.passes:
            if STAGES.index(program.stage) < STAGES.index(item.requires):
                raise PassError(
                    "SNNFX502",
                    f"the pass `{item.name}` takes a program at stage {item.requires!r}, this one is {program.stage!r}",
                    hint=f"Run the passes that lead to {item.requires!r} before it.",
                )
            start = time.perf_counter()
            note = item.apply(program)
            if item.ensures is not None:
                program.stage = item.ensures
            milliseconds = (time.perf_counter() - start) * 1e3
            record = PassRecord(str(item), milliseconds, note, str(program))
            history.append(record)
            if os.environ.get("SNNFX_DEBUG") == "1":
                print(f"{record}\n{record.ir}\n", file=sys.stderr)
            if self.verify:
                verify_program(program, after=item.name)
        return history
