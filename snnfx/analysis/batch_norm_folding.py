"""Which BatchNorms can be folded into the weights of the layer before them."""

from __future__ import annotations

from torch.fx import Node

from snnfx.ir.program import StepProgram
from snnfx.ops.folded_weights import NORMS_AFTER

__all__ = ["can_fold_into_layer", "layer_of_norm"]


def layer_of_norm(norm: Node) -> Node:
    """The node of the layer before a BatchNorm."""
    return norm.args[0]  # type: ignore[return-value]


def can_fold_into_layer(program: StepProgram, node: Node) -> bool:
    """Whether the node is a BatchNorm and the only reader of a layer in its region that can compute it."""
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
