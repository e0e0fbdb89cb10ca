"""Mark the loops that may run without autograd and Python's steps, and say of the others why not.

A loop over T small operations for each of a dozen operators becomes one pass over memory when every element of a step
is computed on its own (loop fusion and strip mining; Allen & Kennedy, "Optimizing Compilers for Modern Architectures",
chapters 5 and 8); where a step has products or convolutions inside, it becomes a list of calls with the elementwise
ones fused between them. Here only what is known from the graph is looked at; which of the two it is, and the kernels
themselves, are made at the first call, for the shapes and dtypes at hand (`snnfx.kernels`, `snnfx.loops`), which may
still refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from snnfx.analysis.lowerable_loops import mixing_node, reason_against_kernel
from snnfx.ir.program import StepProgram
from snnfx.passes.base import Pass

__all__ = ["Lower"]


@dataclass(frozen=True)
class Lower(Pass):
    """Set `lowering_refusal` of every loop region: "" where it may be lowered."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[str] = "partitioned"

    def apply(self, program: StepProgram) -> str:
        loops = [region for region in program.regions if region.kind == "loop"]
        for region in loops:
            region.lowering_refusal = reason_against_kernel(program, region)
        lowered = [region for region in loops if not region.lowering_refusal]
        elementwise = [region for region in lowered if mixing_node(program, region) is None]
        notes = [f"{len(elementwise)} of {len(loops)} loops may be one kernel each"]
        if len(lowered) > len(elementwise):
            notes.append(f"{len(lowered) - len(elementwise)} may run without autograd")
        reasons = dict.fromkeys(
            f"{region.name}: {region.lowering_refusal}" for region in loops if region.lowering_refusal
        )
        return "; ".join([*notes, *reasons])
