"""Which loops may be lowered, decided from the graph."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import is_random
from snnfx.analysis.foldable_loops import folds_when_cut
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.step_functions import read_parameter
from snnfx.sandbox.torch_internals import (
    AdaptiveAvgPoolBase,
    AdaptiveMaxPoolBase,
    AvgPoolBase,
    ConvBase,
    MaxPoolBase,
    NormBase,
)
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_opaque

__all__ = ["mixing_node", "reason_against_kernel"]


def reason_against_kernel(program: StepProgram, region: Region) -> str:
    """Why a loop cannot be lowered; "" if its graph has no obstacle."""
    for node in region.nodes:
        reason = _reason(program, node)
        if reason:
            return reason
    mixing = mixing_node(program, region)
    if mixing is not None and folds_when_cut(program, region):
        return f"`{describe_node(mixing)}` is not element-wise; its steps are folded, as no gradients flow through time"
    return ""


def mixing_node(program: StepProgram, region: Region) -> Node | None:
    """The first node of a loop that mixes elements (product, reduction, convolution); None if element-wise."""
    return next((node for node in region.nodes if _mixes(program, node)), None)


def _reason(program: StepProgram, node: Node) -> str:
    if not node.op.startswith("call"):
        return ""
    if node.target is read_parameter:
        return f"the gradients of all steps go to the parameter that `{describe_node(node.args[0])}` reads"  # type: ignore[arg-type]
    what = describe_node(node)
    module = program.module_of(node)
    if node.target is call_opaque and (module is None or adapter_of(module) is None):
        return f"`{what}` is opaque"
    return f"`{what}` draws random numbers" if is_random(program, node) else ""


def _mixes(program: StepProgram, node: Node) -> bool:
    if not node.op.startswith("call"):
        return False
    module = program.module_of(node)
    if module is not None:
        return any(isinstance(m, _MIXING) for m in module.modules())
    return operation_name(node) in _MIXING_FUNCTIONS


_MIXING = (
    nn.Linear,
    nn.Bilinear,
    ConvBase,
    NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    MaxPoolBase,
    AvgPoolBase,
    AdaptiveAvgPoolBase,
    AdaptiveMaxPoolBase,
    nn.RNNCellBase,
    nn.RNNBase,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.Softmax,
    nn.LogSoftmax,
)
"""Modules whose output elements depend on several input elements."""

_MIXING_FUNCTIONS = frozenset(
    "matmul mm bmm addmm baddbmm linear bilinear einsum dot tensordot mv outer conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d mean sum prod var std norm softmax log_softmax cumsum cumprod sort topk argmax "
    "argmin max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d layer_norm group_norm "
    "adaptive_avg_pool2d batch_norm instance_norm scaled_dot_product_attention embedding roll flip gather scatter "
    "index_select".split()
)
