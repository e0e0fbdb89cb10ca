"""Fold BatchNorm into the weights of the layer before it.

Replaces `norm(layer(x))` in evaluation by `layer(x)` with scaled weights and a shifted bias, which saves one pass over
the sequence. Legal because BatchNorm in evaluation is affine in each channel and a convolution or linear layer is
linear in its weights and bias, provided that the norm is the only reader of the layer. The pass marks these norms;
`snnfx.ops.folded_weights` checks modes, hooks and weights at each call. `snnfx.passes.absorb` runs before and fuses the
norms next to a neuron into its kernel; the norms before a pooling, a branch or an output remain.
Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from snnfx.analysis.batch_norm_folding import can_fold_into_layer, layer_of_norm
from snnfx.ir.facts import IN_WEIGHTS
from snnfx.ir.program import StepProgram
from snnfx.passes.base import Pass

__all__ = ["FoldBatchNorm"]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Mark the BatchNorms to fold into the layer before them (the fact `IN_WEIGHTS`)."""

    name = "fold_batch_norm"
    requires = "partitioned"
    ensures = "planned"
    may_change = ()

    def apply(self, program: StepProgram) -> str:
        for node in program.graph.nodes:
            IN_WEIGHTS.clear(node)
        marked = [node for node in program.graph.nodes if can_fold_into_layer(program, node)]
        for node in marked:
            IN_WEIGHTS.set(node, True)
        pairs = [f"{node.name} into {layer_of_norm(node).name}" for node in marked]
        return f"in evaluation, {', '.join(pairs)}" if pairs else "nothing"
