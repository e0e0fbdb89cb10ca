"""Move elementwise work next to a neuron into its loop, where the kernel does it on the way (loop fusion).

What a fold does for every element on its own, such as a BatchNorm with fixed statistics, a bias or a residual
connection, reads and writes whole sequences. In the kernel of the neuron it costs a few instructions. A node is moved
when only the loop reads it, or when the loop's result is read by nobody else; what it is computed from is at hand
before the loop starts. Kennedy & McKinley, "Maximizing loop parallelism and improving data locality via loop fusion and
distribution", 1993.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import Node

from snnfx.analysis.dependence import ancestors
from snnfx.analysis.foldable_loops import folds_when_cut
from snnfx.ir.nodes import is_size
from snnfx.ir.printing import operation_name
from snnfx.ir.program import SELF_TARGET, Region, StepProgram
from snnfx.ir.setting_read import SettingRead
from snnfx.passes.base import Pass

__all__ = ["Absorb"]

_OPERATIONS = frozenset("add sub rsub mul div truediv neg".split())


@dataclass(frozen=True)
class Absorb(Pass):
    """In evaluation, move nodes from folds into the loops that may be kernels; their names are in `Region.absorbed`."""

    name: ClassVar[str] = "absorb"
    requires: ClassVar[str] = "partitioned"

    def apply(self, program: StepProgram) -> str:
        if program.training:
            return "nothing: in training, backward would compute them again"
        mover = _Mover(program)
        for region in [r for r in program.regions if r.kind == "loop" and r.lowering_refusal == ""]:
            if not folds_when_cut(program, region):
                mover.fill(region)
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
        self.starts: dict[Node, set[str]] = {}
        for slot, value in zip(program.slots, program.initial_values, strict=True):
            for node in ancestors([value]) if isinstance(value, Node) else ():
                if node not in self.region_of:
                    self.starts.setdefault(node, set()).add(slot.name)

    def fill(self, loop: Region) -> None:
        """Take in neighbours as long as there are any."""
        waiting = list(loop.nodes)
        while waiting:
            node = waiting.pop()
            before = [n for n in node.all_input_nodes if self._may_precede(n, loop)]
            after = [n for n in node.users if self._may_follow(node, n, loop)]
            for neighbour in (*before, *after):
                if self.region_of[neighbour] is not loop:
                    self._move(neighbour, loop)
                    waiting.append(neighbour)

    def _may_precede(self, node: Node, loop: Region) -> bool:
        """Only the loop reads it, in its steps or for its first values."""
        return self._is_elementwise(node) and all(
            self.region_of.get(user) is loop or (user in self.starts and self.starts[user] <= set(loop.slots))
            for user in node.users
        )

    def _may_follow(self, result: Node, node: Node, loop: Region) -> bool:
        """The loop's result is read by nobody else, and the other operands are at hand when the loop starts."""
        if not self._is_elementwise(node) or len(result.users) != 1 or result in self.fixed:
            return False
        return all(self._is_at_hand(operand, loop) for operand in node.all_input_nodes)

    def _is_at_hand(self, operand: Node, loop: Region) -> bool:
        region = self.region_of.get(operand)
        if region is None:
            return not is_size(operand)
        return region is loop or self.order[id(region)] < self.order[id(loop)]

    def _is_elementwise(self, node: Node) -> bool:
        region = self.region_of.get(node)
        if region is None or region.kind != "fold" or node in self.fixed or node.meta.get("batch_dim") != 0:
            return False
        if any(n.meta.get("batch_dim", 0) not in (0, None) or is_size(n) for n in node.all_input_nodes):
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
        return operation_name(node) in _OPERATIONS and not node.kwargs

    def _move(self, node: Node, loop: Region) -> None:
        source = self.region_of[node]
        source.nodes = [n for n in source.nodes if n is not node]
        loop.nodes = sorted([*loop.nodes, node], key=self.position.__getitem__)
        loop.absorbed = (*loop.absorbed, node.name)
        self.region_of[node] = loop
        node.meta["kind"], node.meta["region"] = loop.kind, loop.name
        self.moved.append(node.name)
        if node.op == "call_module" and str(node.target) not in self.program.constants:
            # Its mode decides: put into training, it takes statistics over all time steps.
            owner = "" if node.target == SELF_TARGET else str(node.target)
            if not any(read.owner == owner and read.name == "training" for read in self.program.setting_reads):
                self.program.setting_reads.append(SettingRead(owner, "training", False, "False"))
