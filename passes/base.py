"""`Pass`, `PassManager` and the verifier, which live in `snnfx.ir` so that code below the passes can use them."""

from __future__ import annotations

from snnfx.ir.pass_manager import STAGES, Pass, PassManager, PassRecord, verify_program

__all__ = ["STAGES", "Pass", "PassManager", "PassRecord", "verify_program"]
