"""Mark the loops that may be lowered, and record the reason for the others.

A loop runs a dozen small operators T times. If its step is element-wise, a kernel replaces them by one pass over memory
(loop fusion and strip mining); if the step contains products or convolutions, a list of calls with fused element-wise
kernels between them replaces the step. Both run without autograd and without Python code of the step. The pass decides
from the graph alone; the kernels are generated at the first call, for its shapes and dtypes (`snnfx.lowering`), which
may still refuse.
Source: Allen & Kennedy, "Optimizing Compilers for Modern Architectures", chapters 5 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from snnfx.analysis.lowerable_loops import mixing_node, reason_against_kernel
from snnfx.ir.program import StepProgram
from snnfx.passes.base import Pass

__all__ = ["Lower"]


@dataclass(frozen=True)
class Lower(Pass):
    """Set `Region.lowering_refusal` of every loop: "" if it may be lowered."""

    name = "lower"
    requires = "partitioned"
    may_change = ("regions",)

    def apply(self, program: StepProgram) -> str:
        loops = [region for region in program.regions if region.kind == "loop"]
        for region in loops:
            region.lowering_refusal = reason_against_kernel(program, region)
        lowered = [region for region in loops if not region.lowering_refusal]
        elementwise = [region for region in lowered if mixing_node(program, region) is None]
        notes = [f"{len(elementwise)} of {len(loops)} loops may run as one kernel"]
        if len(lowered) > len(elementwise):
            notes.append(f"{len(lowered) - len(elementwise)} may run without autograd")
        reasons = dict.fromkeys(
            f"{region.name}: {region.lowering_refusal}" for region in loops if region.lowering_refusal
        )
        return "; ".join([*notes, *reasons])
