"""Which loops may be lowered, decided from the graph."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional

from snnfx.analysis.dependence import is_random
from snnfx.analysis.foldable_loops import folds_when_cut
from snnfx.analysis.statistic_reads import is_statistic_read, statistic_of
from snnfx.ir.printing import describe_node
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.operator_lookup import traits_of, traits_of_module
from snnfx.ops.step_functions import read_parameter
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_opaque

__all__ = ["has_only_linear_products", "mixing_node", "reason_against_kernel"]


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


def has_only_linear_products(program: StepProgram, region: Region) -> bool:
    """Whether all nodes of a loop that mix elements are products of two matrices or linear layers."""
    return all(_is_linear_product(program, node) for node in region.nodes if _mixes(program, node))


def _is_linear_product(program: StepProgram, node: Node) -> bool:
    module = program.module_of(node)
    return type(module) is nn.Linear if module is not None else node.target in _LINEAR_PRODUCTS


_LINEAR_PRODUCTS = (functional.linear, torch.mm, torch.addmm, torch.matmul, operator.matmul)


def _reason(program: StepProgram, node: Node) -> str:
    if not node.op.startswith("call"):
        return ""
    if is_statistic_read(node):
        return f"`{statistic_of(node)}` differs between steps"
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
        return any(traits_of_module(m).mixes for m in module.modules())
    return traits_of(node).mixes
