"""Decide which operations of a program a picture shows: repeated blocks once, closed modules as one box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.analysis.dependence import analyse_dependence
from snnfx.inspect.picture.layer_summary import summarize_node
from snnfx.inspect.picture.repeated_blocks import BlockGraph, Repetition, find_repetitions, without_numbers
from snnfx.ir.facts import MODULE
from snnfx.ir.nodes import is_module_call, is_size, is_structural
from snnfx.ir.program import StepProgram
from snnfx.ops.step_functions import expect_size

__all__ = ["LARGE", "DrawnOperations"]

LARGE = 24
"""Repeated blocks are drawn once in a picture of more than this many operations."""


class DrawnOperations:
    """The operations of a program that a picture shows.

    Args:
        program: the program.
        depth: the number of levels of modules that are drawn open; None: all, and repeated blocks are drawn once.
        region_of: operation -> its region, when regions are drawn.
        runs: region -> its kind and how it runs; blocks repeat only if their regions run in the same way.

    Attributes:
        nodes: the operations that are drawn.
        slots: the drawn slots, each with its next value.
        twins: drawn operation -> itself and the operations of other blocks for which it stands.
        closed: drawn operation -> the closed module that it is in.
        repetitions: drawn operation -> the repetitions that it is in, the outermost first.
        sequential: the operations on a cycle through time.
    """

    def __init__(
        self,
        program: StepProgram,
        depth: int | None = None,
        region_of: Mapping[Node, str] | None = None,
        runs: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.program, self.depth = program, depth
        self._drawn_for: dict[Node, Node] = {}
        dependence = analyse_dependence(program)
        self.sequential = dependence.sequential
        every = [n for n in program.graph.nodes if _is_drawn(n) and n not in dependence.initial_only]
        slots = dict(zip(program.slot_nodes(), program.next_states, strict=True))
        self.containers = {node: _containers(node) for node in every}
        is_list = {
            c: isinstance(program.resolve(c), nn.ModuleList) for chain in self.containers.values() for c in chain
        }
        modules = {node: tuple(c for c in chain if not is_list[c]) for node, chain in self.containers.items()}
        self.repetitions: dict[Node, list[Repetition]] = {}
        self.twins = {node: [node] for node in every}
        if depth is not None or len(every) > LARGE:
            region_of, runs = region_of or {}, runs or {}
            forms = {node: self._form(node) + runs.get(region_of.get(node, ""), ()) for node in every}
            operands = {node: self.operands(node) for node in every}
            following = {slot: self.source(value) for slot, value in slots.items()}
            ends = frozenset(n for n in map(self.source, program.outputs) if n is not None)
            graph = BlockGraph(every, modules, operands, following, forms, ends)
            for repetition in find_repetitions(graph, depth):
                self._draw_once(repetition, following)
        self.nodes = [node for node in every if node not in self._drawn_for]
        self.slots = {slot: value for slot, value in slots.items() if slot not in self._drawn_for}
        self.closed: dict[Node, str] = {}
        if depth is not None:
            inside: dict[str, list[Node]] = {}
            for node in self.nodes:
                if len(modules[node]) > depth:
                    inside.setdefault(modules[node][depth], []).append(node)
            self.closed = {node: name for name, nodes in inside.items() if len(nodes) > 1 for node in nodes}

    def _draw_once(self, repetition: Repetition, following: Mapping[Node, Node | None]) -> None:
        """Let the first block stand for all."""
        first, *others = repetition.copies
        slots_of: dict[Node, list[Node]] = {}
        for slot, value in following.items():
            if value is not None:
                slots_of.setdefault(value, []).append(slot)
        for node in first:
            self.repetitions.setdefault(node, []).append(repetition)
        for copy in others:
            for node, twin in zip(first, copy, strict=True):
                self._drawn_for[twin] = node
                self.twins[node] += self.twins.pop(twin)
                for slot, other in zip(slots_of.get(node, []), slots_of.get(twin, []), strict=True):
                    self._drawn_for[other] = slot

    def _form(self, node: Node) -> tuple[str, ...]:
        title, detail = summarize_node(self.program, node)
        return title, without_numbers(detail)

    def drawn(self, node: Node) -> Node:
        """The operation or slot that stands for a node."""
        while node in self._drawn_for:
            node = self._drawn_for[node]
        return node

    def source(self, value: Any) -> Node | None:
        """The drawn node, slot, input or parameter that a value comes from; None for sizes and constants."""
        while isinstance(value, Node) and is_structural(value):
            value = value.args[0]
        if not isinstance(value, Node) or is_size(value) or value.target is expect_size:
            return None
        if value.op == "get_attr" and not isinstance(self.program.resolve(str(value.target)), Tensor):
            return None
        return self.drawn(value)

    def operands(self, node: Node) -> list[Node]:
        """The different sources of the operands of a node."""
        sources = (self.source(operand) for operand in node.all_input_nodes)
        return list(dict.fromkeys(s for s in sources if s is not None))


def _is_drawn(node: Node) -> bool:
    computes = node.op.startswith("call") and node.target is not expect_size
    return computes and not is_structural(node) and not is_size(node)


def _containers(node: Node) -> tuple[str, ...]:
    """The qualified names of the containers that a node is in, the outermost first."""
    module = str(node.target) if node.op == "call_module" else str(MODULE.of(node) or "")
    if node.op == "call_module" or is_module_call(node):
        module = module.rpartition(".")[0]
    parts = module.split(".") if module else []
    return tuple(".".join(parts[: i + 1]) for i in range(len(parts)))
