"""Find the weight ops of a step: linear layers, convolutions and products with a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.dependence import Dependence
from snnfx.ir.facts import VALUE
from snnfx.ir.program import StepProgram
from snnfx.ops.operator_lookup import traits_of_name


@dataclass(frozen=True)
class WeightOp:
    """A weight op: the node and the position of its operand (None: the input of a module)."""

    node: Node
    position: int | None

    @property
    def operand(self) -> Node:
        """The current operand, which changes if another weight op in front is replaced."""
        operand = self.node.args[self.position or 0]
        assert isinstance(operand, Node)
        return operand


def weight_ops(program: StepProgram, dependence: Dependence) -> list[WeightOp]:
    """Linear layers, convolutions and products with a weight that does not change with time."""
    found: list[WeightOp] = []
    for node in program.graph.nodes:
        if not node.op.startswith("call") or node in dependence.initial_only or node not in dependence.varying:
            continue
        row = find_rule(node, program.resolve)
        if row is None or not traits_of_name(row.name).weighted:
            continue
        if node.op == "call_module":
            operand = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if isinstance(operand, Node) and _has_parameters(program.resolve(str(node.target))):
                found.append(WeightOp(node, None))
            continue
        if node.kwargs.keys() & {"input", "self", "other", "mat2"}:
            continue
        for position, name in enumerate(traits_of_name(row.name).weighted.split()):
            operand = node.args[position]
            others = [n for n in node.all_input_nodes if n is not operand]
            varies = isinstance(operand, Node) and operand in dependence.varying
            if varies and others and not any(n in dependence.varying for n in others):
                assert row.arguments[name] is operand
                found.append(WeightOp(node, position))
                break
    return found


def groups_of(program: StepProgram, node: Node) -> int:
    """The number of groups of a convolution; 1 for other weight ops."""
    if node.op == "call_module":
        return int(getattr(program.resolve(str(node.target)), "groups", 1))
    found = find_rule(node, program.resolve)
    if found is None or not found.name.startswith("conv"):
        return 1
    groups = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)  # in both signatures of torch
    return groups if isinstance(groups, int) else 1


def output_channels_of(program: StepProgram, node: Node) -> int:
    """The number of output channels of a convolution with groups."""
    if node.op == "call_module":
        return int(program.resolve(str(node.target)).out_channels)
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    assert isinstance(weight, Node)
    value = program.resolve(str(weight.target)) if weight.op == "get_attr" else VALUE.of(weight)
    assert isinstance(value, Tensor)
    found = find_rule(node, program.resolve)
    is_transposed = found is not None and "transpose" in found.name
    return value.shape[1] * groups_of(program, node) if is_transposed else value.shape[0]


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())
