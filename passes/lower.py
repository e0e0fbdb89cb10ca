"""Mark the loops that may run as one generated kernel, and say of the others why not.

A loop over T small operations for each of a dozen operators becomes one pass over memory when every element of a step
is computed on its own (loop fusion and strip mining; Allen & Kennedy, "Optimizing Compilers for Modern Architectures",
chapters 5 and 8). Here only what is known from the graph is looked at; the kernel itself is made at the first call, for
the shapes and dtypes at hand (`snnfx.kernels`), which may still refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import Node

from snnfx.passes.base import Pass
from snnfx.passes.dependence import is_random
from snnfx.program import Region, StepProgram, describe_node, operation_name
from snnfx.state import call_opaque

__all__ = ["Lower", "reason_against_kernel"]


@dataclass(frozen=True)
class Lower(Pass):
    """Set `not_lowered` of every loop region: "" where a kernel may run it."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[str] = "partitioned"

    def apply(self, program: StepProgram) -> str:
        loops = [region for region in program.regions if region.kind == "loop"]
        for region in loops:
            region.not_lowered = reason_against_kernel(program, region)
        refused = [region for region in loops if region.not_lowered]
        note = f"{len(loops) - len(refused)} of {len(loops)} loops may be one kernel each"
        reasons = dict.fromkeys(f"{region.name}: {region.not_lowered}" for region in refused)
        return "; ".join([note, *reasons])


def reason_against_kernel(program: StepProgram, region: Region) -> str:
    """Why a loop is not elementwise, as far as its graph tells; "" where nothing is known against it."""
    for node in region.nodes:
        reason = _reason(program, node)
        if reason:
            return reason
    return ""


def _reason(program: StepProgram, node: Node) -> str:
    if not node.op.startswith("call"):
        return ""
    what = describe_node(node)
    if node.target is call_opaque:
        return f"`{what}` is opaque"
    if is_random(program, node):
        return f"`{what}` draws random numbers"
    module = program.module_of(node)
    if module is not None:
        mixing = next((m for m in module.modules() if isinstance(m, _MIXING)), None)
        return "" if mixing is None else f"`{what}` ({type(mixing).__name__}) is not elementwise"
    return f"`{what}` is not elementwise" if operation_name(node) in _MIXING_FUNCTIONS else ""


_MIXING = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
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
