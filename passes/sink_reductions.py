"""Sink a reduction over time through affine operations at the end of the step graph.

Replaces `mean_t(A x_t)` by `A mean_t(x_t)` for an affine operation A (likewise the sum), so that A runs once instead of
T times. For the last step, this holds for every operation that is parallel in time. The pass marks the nodes to run on
the reduced value: nodes whose value only outputs and other marked nodes read. Legal up to rounding, as the reduction is
reassociated.
Source: loop-invariant code motion out of a reduction; Allen & Kennedy, Optimizing Compilers for Modern Architectures,
sec. 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import Dependence, analyse_dependence, is_random
from snnfx.analysis.statistic_reads import is_statistic_read
from snnfx.ir.facts import SUNK
from snnfx.ir.nodes import is_module_call, is_size, takes_from_tuple
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.operator_lookup import traits_of, traits_of_module
from snnfx.ops.step_functions import expect_size
from snnfx.passes.base import Pass
from snnfx.sandbox.torch_internals import BatchNormBase, DropoutBase
from snnfx.state.leaf_modules import has_torch_forward

__all__ = ["REDUCTIONS", "SinkReductions"]

REDUCTIONS = ("mean", "sum", "last")


@dataclass(frozen=True)
class SinkReductions(Pass):
    """Mark the nodes that run once, on operands reduced over time (the fact `SUNK`).

    Args:
        reduce: "mean", "sum" or "last".
        invariant_inputs: placeholders of inputs that do not change with time.
    """

    name = "sink_reductions"
    requires = "normalized"
    may_change = ()

    reduce: str = "mean"
    invariant_inputs: tuple[str, ...] = ()

    def apply(self, program: StepProgram) -> str:
        dependence = analyse_dependence(program, self.invariant_inputs)
        may_sink = self._may_run_on_the_last if self.reduce == "last" else self._is_affine
        sunk: set[Node] = set()
        for node in reversed(list(program.graph.nodes)):
            if self._only_feeds_outputs(program, node, sunk) and may_sink(program, node, dependence):
                sunk.add(node)
        for node in program.graph.nodes:
            # An element of a tuple belongs to the region of the tuple.
            if node in sunk and takes_from_tuple(node) and node.args[0] not in sunk:
                sunk.discard(node)
        for node in sunk:
            SUNK.set(node, True)
        return f"{len(sunk)} nodes run on the {self.reduce} over time"

    @staticmethod
    def _only_feeds_outputs(program: StepProgram, node: Node, sunk: set[Node]) -> bool:
        if not node.op.startswith("call") or is_size(node) or node.target is expect_size or is_statistic_read(node):
            return False
        if any(value is node for value in (*program.next_states, *program.initial_values)):
            return False
        return all(user in sunk or user.op == "output" for user in node.users)

    @staticmethod
    def _may_run_on_the_last(program: StepProgram, node: Node, dependence: Dependence) -> bool:
        if node not in dependence.varying or node in dependence.sequential or is_module_call(node):
            return False
        module = program.module_of(node)
        trains = isinstance(module, BatchNormBase) and program.training
        return not trains and not is_random(program, node)

    @staticmethod
    def _is_affine(program: StepProgram, node: Node, dependence: Dependence) -> bool:
        varying = [o for o in node.all_input_nodes if o in dependence.varying and not is_size(o)]
        if node not in dependence.varying or node in dependence.sequential or not varying:
            return False
        if any(is_size(o) for o in node.all_input_nodes) and operation_name(node) not in ("view", "reshape", "expand"):
            return False
        if node.op == "call_module":
            return _is_affine_module(program.resolve(str(node.target)), program.training)
        traits = traits_of(node)
        if any(name in node.kwargs for name in traits.linear_without.split()):
            return False
        if traits.linear == "all":
            return "alpha" not in node.kwargs or not isinstance(node.kwargs["alpha"], Node)
        if traits.linear == "each":
            return len(varying) == 1 and list(_tensors(node)).count(varying[0]) == 1
        return traits.linear == "first" and varying == [node.args[0]]


def _is_affine_module(module: nn.Module, training: bool) -> bool:
    if isinstance(module, BatchNormBase):
        return not training and module.running_mean is not None
    if isinstance(module, DropoutBase):
        return not training
    return has_torch_forward(module) and traits_of_module(module).linear == "first"


def _tensors(node: Node) -> Any:
    walk: list[Any] = [*node.args, *node.kwargs.values()]
    while walk:
        value = walk.pop()
        if isinstance(value, Node):
            yield value
        elif isinstance(value, list | tuple):
            walk.extend(value)
