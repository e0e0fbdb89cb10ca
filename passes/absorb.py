"""Fuse element-wise nodes of folds into the loop of the adjacent neuron (loop fusion).

Replaces an element-wise node of a fold (BatchNorm in evaluation, a bias, a residual connection), which reads and writes
whole sequences, by the same node inside the loop, where the kernel of the neuron computes it in a few instructions.
Legal if only the loop reads the node, or if the node is the only reader of a result of the loop and its other operands
are available before the loop starts.
Source: Kennedy & McKinley, "Maximizing loop parallelism and improving data locality via loop fusion and distribution",
1993.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import ancestors
from snnfx.analysis.foldable_loops import folds_when_cut
from snnfx.ir.facts import BATCH_DIM, KIND, REGION
from snnfx.ir.nodes import is_size
from snnfx.ir.program import SELF_TARGET, Region, StepProgram
from snnfx.ir.setting_read import SettingRead
from snnfx.ops.operator_lookup import traits_of
from snnfx.passes.base import Pass

__all__ = ["Absorb"]


@dataclass(frozen=True)
class Absorb(Pass):
    """In evaluation, move element-wise nodes from folds into loops that may be lowered, see `Region.absorbed`."""

    name = "absorb"
    requires = "partitioned"
    may_change = ("regions",)

    def apply(self, program: StepProgram) -> str:
        if program.training:
            return "nothing: in training, backward would recompute the nodes"
        mover = _Mover(program)
        for region in [r for r in program.regions if r.kind == "loop" and r.lowering_refusal == ""]:
            if not folds_when_cut(program, region):
                mover.absorb_adjacent(region)
        program.regions = [region for region in program.regions if region.nodes]
        return f"moved {', '.join(mover.moved) or 'nothing'}"


class _Mover:
    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.position = {node: i for i, node in enumerate(program.graph.nodes)}
        self.region_of = {node: region for region in program.regions for node in region.nodes}
        self.order = {id(region): i for i, region in enumerate(program.regions)}
        self.fixed = {v for v in (*program.next_states, *program.initial_values) if isinstance(v, Node)}
        self.moved: list[str] = []
        self.initial_slots: dict[Node, set[str]] = {}
        for slot, value in zip(program.slots, program.initial_values, strict=True):
            for node in ancestors([value]) if isinstance(value, Node) else ():
                if node not in self.region_of:
                    self.initial_slots.setdefault(node, set()).add(slot.name)

    def absorb_adjacent(self, loop: Region) -> None:
        """Move adjacent element-wise nodes into a loop until none is left."""
        waiting = list(loop.nodes)
        while waiting:
            node = waiting.pop()
            before = [n for n in node.all_input_nodes if self._may_precede(n, loop)]
            after = [n for n in node.users if self._may_follow(node, n, loop)]
            for adjacent in (*before, *after):
                if self.region_of[adjacent] is not loop:
                    self._move(adjacent, loop)
                    waiting.append(adjacent)

    def _may_precede(self, node: Node, loop: Region) -> bool:
        """Whether only the loop reads a node, in its steps or for its initial values."""
        return self._is_elementwise(node) and all(
            self.region_of.get(user) is loop
            or (user in self.initial_slots and self.initial_slots[user] <= set(loop.slots))
            for user in node.users
        )

    def _may_follow(self, result: Node, node: Node, loop: Region) -> bool:
        """Whether a node is the only reader of a loop result, with its other operands available before the loop."""
        if not self._is_elementwise(node) or len(result.users) != 1 or result in self.fixed:
            return False
        return all(self._is_available(operand, loop) for operand in node.all_input_nodes)

    def _is_available(self, operand: Node, loop: Region) -> bool:
        region = self.region_of.get(operand)
        if region is None:
            return not is_size(operand)
        return region is loop or self.order[id(region)] < self.order[id(loop)]

    def _is_elementwise(self, node: Node) -> bool:
        region = self.region_of.get(node)
        if region is None or region.kind != "fold" or node in self.fixed or BATCH_DIM.of(node) != 0:
            return False
        if any(BATCH_DIM.of(n) not in (0, None) or is_size(n) for n in node.all_input_nodes):
            return False
        if node.op == "call_module":
            module = self.program.resolve(str(node.target))
            return (
                isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
                and module.running_mean is not None
                and not self.program.mode_of(module)
                and len(node.args) == 1
                and not node.kwargs
            )
        traits = traits_of(node)
        return traits.elementwise and bool(traits.linear) and not traits.view and not node.kwargs

    def _move(self, node: Node, loop: Region) -> None:
        source = self.region_of[node]
        source.nodes = [n for n in source.nodes if n is not node]
        loop.nodes = sorted([*loop.nodes, node], key=self.position.__getitem__)
        loop.absorbed = (*loop.absorbed, node.name)
        self.region_of[node] = loop
        KIND.set(node, loop.kind)
        REGION.set(node, loop.name)
        self.moved.append(node.name)
        if node.op == "call_module" and str(node.target) not in self.program.constants:
            # The mode of the layer is part of the plan: in training, it would take statistics over all time steps.
            owner = "" if node.target == SELF_TARGET else str(node.target)
            if not any(read.owner == owner and read.name == "training" for read in self.program.setting_reads):
                self.program.setting_reads.append(SettingRead(owner, "training", False, "False"))
