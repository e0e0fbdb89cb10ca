"""Nodes whose time steps depend on each other in training, because they take statistics over a batch."""

from __future__ import annotations

from torch.fx import Node

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.ir.module_effects import keeps_statistics
from snnfx.ir.program import StepProgram
from snnfx.ops.operator_lookup import traits_of_name
from snnfx.sandbox.torch_internals import BatchNormBase

__all__ = ["takes_batch_statistics"]


def takes_batch_statistics(program: StepProgram, node: Node) -> bool:
    """Whether a node takes batch statistics in training, so that its time steps depend on each other."""
    module = program.module_of(node)
    if module is not None and any(isinstance(m, BatchNormBase) for m in module.modules()):
        return True
    if keeps_statistics(program, node):
        return True
    rule = find_rule(node, program.resolve)
    return rule is not None and traits_of_name(rule.name).statistics
