"""`Pass`, `PassManager` and the verifier, re-exported from `snnfx.ir`."""

from __future__ import annotations

from snnfx.ir.graph_pass import Pass
from snnfx.ir.pass_manager import PassManager, PassRecord
from snnfx.ir.program import STAGES
from snnfx.ir.verifier import verify_program

__all__ = ["STAGES", "Pass", "PassManager", "PassRecord", "verify_program"]
