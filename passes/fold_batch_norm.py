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

from torch.fx import Node

from snnfx.ir.program import StepProgram
from snnfx.ops.folded_weights import NORMS_AFTER
from snnfx.passes.base import Pass

__all__ = ["FoldBatchNorm", "layer_of_norm"]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Mark the BatchNorms that the layer before them computes in evaluation (`node.meta["in_weights"]`)."""

    name: ClassVar[str] = "fold_batch_norm"
    requires: ClassVar[str] = "partitioned"

    def apply(self, program: StepProgram) -> str:
        for node in program.graph.nodes:
            node.meta.pop("in_weights", None)
        marked = [node for node in program.graph.nodes if _may_be_in_weights(program, node)]
        for node in marked:
            node.meta["in_weights"] = True
        pairs = [f"{node.name} into {layer_of_norm(node).name}" for node in marked]
        return f"in evaluation, {', '.join(pairs)}" if pairs else "nothing"


def layer_of_norm(norm: Node) -> Node:
    """The layer whose result a marked BatchNorm takes."""
    return norm.args[0]  # type: ignore[return-value]


def _may_be_in_weights(program: StepProgram, node: Node) -> bool:
    if node.meta.get("kind") not in ("once", "fold") or not _takes_one_argument(node):
        return False
    before = layer_of_norm(node)
    if not _takes_one_argument(before) or before.meta.get("region") != node.meta["region"]:
        return False
    layer, norm = program.resolve(str(before.target)), program.resolve(str(node.target))
    known = type(norm) is NORMS_AFTER.get(type(layer)) and norm.running_mean is not None
    return known and list(before.users) == [node]


def _takes_one_argument(node: Node) -> bool:
    return node.op == "call_module" and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], Node)
