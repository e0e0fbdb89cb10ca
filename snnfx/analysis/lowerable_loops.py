"""Whether a loop may be lowered to a kernel or a list of ATen calls, decided from its graph."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import is_random
from snnfx.analysis.foldable_loops import folds_when_cut
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ir.program import Region, StepProgram
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
    """Why a loop cannot be lowered, as far as its graph tells; "" where nothing is known against it."""
    for node in region.nodes:
        reason = _reason(program, node)
        if reason:
            return reason
    mixing = mixing_node(program, region)
    if mixing is not None and folds_when_cut(program, region):
        return f"`{describe_node(mixing)}` is not elementwise, and without gradients through time its steps are folded"
    return ""


def mixing_node(program: StepProgram, region: Region) -> Node | None:
    """A node of a loop whose outputs are made of several elements of its input, if one is known."""
    return next((node for node in region.nodes if _mixes(program, node)), None)


def _reason(program: StepProgram, node: Node) -> str:
    if not node.op.startswith("call"):
        return ""
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
"""Modules whose outputs are made of several elements of their input."""

_MIXING_FUNCTIONS = frozenset(
    "matmul mm bmm addmm baddbmm linear bilinear einsum dot tensordot mv outer conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d mean sum prod var std norm softmax log_softmax cumsum cumprod sort topk argmax "
    "argmin max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d layer_norm group_norm "
    "adaptive_avg_pool2d batch_norm instance_norm scaled_dot_product_attention embedding roll flip gather scatter "
    "index_select".split()
)
