"""Find the weight ops of a step: linear layers, convolutions and products with a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.dependence import Dependence
from snnfx.ir.program import StepProgram

_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()


_PRODUCTS = {"linear": "input", "matmul": "input other", "mm": "input mat2", **dict.fromkeys(_CONVOLUTIONS, "input")}
"""Function with a weight -> its arguments that may be the operand."""


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
        if row is None or row.name not in _PRODUCTS:
            continue
        if node.op == "call_module":
            operand = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if isinstance(operand, Node) and _has_parameters(program.resolve(str(node.target))):
                found.append(WeightOp(node, None))
            continue
        if node.kwargs.keys() & {"input", "self", "other", "mat2"}:
            continue
        for position, name in enumerate(_PRODUCTS[row.name].split()):
            operand = node.args[position]
            others = [n for n in node.all_input_nodes if n is not operand]
            varies = isinstance(operand, Node) and operand in dependence.varying
            if varies and others and not any(n in dependence.varying for n in others):
                assert row.arguments[name] is operand
                found.append(WeightOp(node, position))
                break
    return found


def _has_parameters(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())
