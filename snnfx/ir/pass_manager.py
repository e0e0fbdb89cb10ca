"""The pass manager: run passes in order, verify the program after each, record the IR.

If a pass breaks the program, the error names the pass and the node and shows the surrounding lines of IR. With
SNNFX_DEBUG=1 in the environment, the IR after each pass is printed to stderr.
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
    """The record of one pass: description with options, milliseconds, note, and the IR after it."""

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
        verify: verify the program after each pass.
    """

    passes: Sequence[Pass]
    verify: bool = True

    def run(self, program: StepProgram, history: list[PassRecord] | None = None) -> list[PassRecord]:
        """Apply all passes to `program` in place.

        Returns:
            `history` (default: a new list) with one record appended for each pass.

        Raises:
            PassError: a pass requires a later stage (SNNFX502) or left the graph invalid (SNNFX501).
        """
        history = history if history is not None else []
        for item in self.passes:
            if STAGES.index(program.stage) < STAGES.index(item.requires):
                raise PassError(
                    "SNNFX502",
                    f"the pass `{item.name}` requires stage {item.requires!r}, the program is at {program.stage!r}",
                    hint=f"Run the passes that reach stage {item.requires!r} first.",
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
