"""Let a layer compute the BatchNorm after it: `norm(layer(x))` becomes `layer(x)` with other weights and bias.

In evaluation a BatchNorm multiplies each channel by a constant and adds one, and a convolution or linear layer is
linear in its weights and bias: those times the constant give the same, without a pass over the sequence. The pass marks
the BatchNorms that may be computed so; nobody else may read what the layer gives. Before it `snnfx.passes.absorb` moves
those next to a neuron into its kernel, where they cost nothing; left are those before a pooling, a branch or an output.
Modes, hooks and values are looked at in each call (`snnfx.ops.folded_weights`). Jacob et al., "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from snnfx.analysis.batch_norm_folding import can_fold_into_layer, layer_of_norm
from snnfx.ir.program import StepProgram
from snnfx.passes.base import Pass

__all__ = ["FoldBatchNorm"]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Mark the BatchNorms that the layer before them computes in evaluation (`node.meta["in_weights"]`)."""

    name: ClassVar[str] = "fold_batch_norm"
    requires: ClassVar[str] = "partitioned"

    def apply(self, program: StepProgram) -> str:
        for node in program.graph.nodes:
            node.meta.pop("in_weights", None)
        marked = [node for node in program.graph.nodes if can_fold_into_layer(program, node)]
        for node in marked:
            node.meta["in_weights"] = True
        pairs = [f"{node.name} into {layer_of_norm(node).name}" for node in marked]
        return f"in evaluation, {', '.join(pairs)}" if pairs else "nothing"
