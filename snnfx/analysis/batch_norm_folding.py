"""Which BatchNorms fold: time into their batch, or the norm into the weights of the layer before it."""

from __future__ import annotations

from torch.fx import Node

from snnfx.ir.facts import KIND, REFUSAL, REGION
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ir.program import SELF_TARGET, StepProgram
from snnfx.ops.folded_weights import NORMS_AFTER
from snnfx.sandbox.torch_internals import BatchNormBase
from snnfx.state.leaf_modules import has_torch_forward

__all__ = ["can_fold_into_layer", "folds_time_into_dim_0", "layer_of_norm", "unfolded_batch_norms"]


def folds_time_into_dim_0(program: StepProgram, node: Node) -> bool:
    """Whether the node is a BatchNorm in training that takes statistics over T*N samples if T is folded into dim 0.

    BatchNorm reduces over dim 0 and normalises each element alone, so this holds wherever the batch dimension of the
    step is.
    """
    module = program.module_of(node)
    if not program.training or node.op != "call_module" or not isinstance(module, BatchNormBase):
        return False
    if module.running_mean is None and not program.is_in_training(module):
        return False  # frozen, but without running statistics: it uses those of each step
    return has_torch_forward(module) and len(node.all_input_nodes) == 1


def unfolded_batch_norms(program: StepProgram) -> dict[str, str]:
    """The BatchNorms that do not take statistics over all time steps in training: description -> reason."""
    found: dict[str, str] = {}
    for region in program.regions if program.training else ():
        for node in region.nodes if region.kind in ("map", "loop") else ():
            refusal = REFUSAL.of(node)
            reason = refusal.reason.rstrip(".") if refusal is not None else "it is stepped"
            for name in _norms_called(program, node):
                found.setdefault(name, reason)
    return found


def _norms_called(program: StepProgram, node: Node) -> list[str]:
    """The names of the BatchNorm modules that a node calls; for a function, its own name."""
    module = program.module_of(node)
    if module is None:
        is_function = node.op == "call_function" and operation_name(node) == "batch_norm"
        return [describe_node(node)] if is_function else []
    owner = node.target if node.op == "call_module" else node.args[0].target  # type: ignore[union-attr]
    prefix = "" if owner == SELF_TARGET else str(owner)
    names = (f"{prefix}.{name}".strip(".") for name, part in module.named_modules() if isinstance(part, BatchNormBase))
    return [name or "the model" for name in names]


def layer_of_norm(norm: Node) -> Node:
    """The node of the layer before a BatchNorm."""
    return norm.args[0]  # type: ignore[return-value]


def can_fold_into_layer(program: StepProgram, node: Node) -> bool:
    """Whether the node is a BatchNorm and the only reader of a layer in its region that can compute it."""
    if KIND.of(node) not in ("once", "fold") or not _takes_one_argument(node):
        return False
    before = layer_of_norm(node)
    if not _takes_one_argument(before) or REGION.of(before) != REGION.of(node):
        return False
    layer, norm = program.resolve(str(before.target)), program.resolve(str(node.target))
    known = type(norm) is NORMS_AFTER.get(type(layer)) and norm.running_mean is not None
    return known and list(before.users) == [node]


def _takes_one_argument(node: Node) -> bool:
    return node.op == "call_module" and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], Node)
