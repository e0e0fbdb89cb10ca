"""`Pass`, `Rewrite`, `PassManager` and the verifier, re-exported from `snnfx.ir`."""

from __future__ import annotations

from snnfx.ir.graph_pass import Pass
from snnfx.ir.pass_manager import PassManager, PassRecord
from snnfx.ir.program import STAGES, StepProgram
from snnfx.ir.rewrite import Match, Rewrite, call
from snnfx.ir.verifier import verify_program

__all__ = [
    "STAGES",
    "Match",
    "Pass",
    "PassManager",
    "PassRecord",
    "Rewrite",
    "StepProgram",
    "call",
    "verify_program",
]
