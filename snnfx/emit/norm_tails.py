"""Find the tails of folds that the loop after them may compute: BatchNorms in training, and additions."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.functional import multi_step_forward, seq_to_ann_forward
from snnfx.lowering.elementwise.cpp.cpp_launch import CppBackEnd
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.ops.folded_weights import call_norm
from snnfx.ops.sequence_functions import call_module
from snnfx.ops.statistics import read_statistic
from snnfx.regions.normed_loop import Tail
from snnfx.regions.region_modules import LoopRegion
from snnfx.regions.sequence_region import RegionGraph
from snnfx.state.leaf_modules import has_torch_forward

__all__ = ["FusedTails", "find_tails"]

_ADDITIONS = (operator.add, torch.add)


@dataclass(frozen=True)
class FusedTails:
    """The tails that loops compute.

    Args:
        of_fold: for each call of a fold, the tail of each output that a loop computes, by its index.
        of_loop: for each call of a loop, the tail of each of its inputs; None for a plain input.
    """

    of_fold: Mapping[Node, Mapping[int, Tail]]
    of_loop: Mapping[Node, Sequence[Tail | None]]


def find_tails(graph: fx.Graph, root: nn.Module) -> FusedTails:
    """The tails of an emitted graph that the loops after them may compute.

    A tail needs a BatchNorm in training with the forward of torch, called once in the graph; its result is read by one
    loop only, which an element-wise kernel runs from the reset state. A graph that reads statistics keeps all norms
    where they are.

    Args:
        graph: an emitted graph.
        root: the module that its targets refer to.
    """
    of_fold: dict[Node, dict[int, Tail]] = {}
    of_loop: dict[Node, list[Tail | None]] = {}
    objects = {n: _attribute(root, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    if any(n.target is read_statistic for n in graph.nodes):
        return FusedTails({}, {})
    calls = _count_calls(graph, objects)
    for loop in graph.nodes:
        if loop.target is not multi_step_forward or loop.kwargs.get("state") is not None:
            continue
        if not _is_elementwise_kernel(objects.get(loop.args[1])):
            continue
        tails: list[Tail | None] = []
        for operand in loop.args[0]:
            found = _tail_of(operand, objects, calls)
            tails.append(found)
            if found is not None:
                call, index = operand.args
                of_fold.setdefault(call, {})[index] = found
        if any(tails):
            of_loop[loop] = tails
    return FusedTails(of_fold, of_loop)


def _count_calls(graph: fx.Graph, objects: Mapping[Node, Any]) -> Counter[int]:
    """How often a graph calls each module, by its id; a fold may call a module several times."""
    calls: Counter[int] = Counter()
    for node in graph.nodes:
        given: Any = node.kwargs.get("constants", ()) or ()
        region = objects.get(node.args[1]) if node.target is seq_to_ann_forward else None
        inner = [n for n in region.graph.nodes if n.op == "placeholder"] if isinstance(region, RegionGraph) else []
        for number, constant in enumerate(given):
            calls[id(objects.get(constant))] += _count_readers(inner[number]) if inner else 1
    return calls


def _count_readers(module: Node) -> int:
    """How many nodes may call a module; a layer that leaves it to the `call_norm` after it does not."""
    after = {n.args[1] for n in module.users if n.target is call_norm and n.args[0] is module}
    return sum(n not in after or n.args[0] is module for n in module.users)


def _attribute(root: nn.Module, target: str) -> Any:
    found: Any = root
    for atom in target.split("."):
        found = getattr(found, atom)
    return found


def _is_elementwise_kernel(loop: Any) -> bool:
    """Whether the latest call of a loop ran as a C++ kernel of an element-wise step."""
    if type(loop) is not LoopRegion or loop.kernels is None or loop.make_start is None:
        return False
    lowered = loop.kernels.in_use
    return isinstance(lowered, LoweredStep) and isinstance(lowered.back_end, CppBackEnd)


def _tail_of(operand: Any, objects: Mapping[Node, Any], calls: Mapping[int, int]) -> Tail | None:
    """The tail that computes an input of a loop."""
    if not isinstance(operand, Node) or operand.target is not operator.getitem or len(operand.users) != 1:
        return None
    call, index = operand.args
    if not isinstance(call, Node) or call.target is not seq_to_ann_forward or set(call.kwargs) - {"constants"}:
        return None
    region = objects.get(call.args[1])  # type: ignore[arg-type]
    if not isinstance(region, RegionGraph) or sum(n.args[1] == index for n in call.users) != 1:
        return None
    placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
    constants: Any = call.kwargs.get("constants", ())
    modules = {p: objects.get(c) for p, c in zip(placeholders, constants, strict=False)}
    results: Any = region.graph.output_node().args[0]
    result = results[index]
    if sum(r is result for r in results) != 1:
        return None
    return _Search(modules, calls).tail(result, region.graph.output_node())


class _Search:
    """Collects the tail that ends in one node of the graph of a fold."""

    def __init__(self, modules: Mapping[Node, Any], calls: Mapping[int, int]) -> None:
        self.modules, self.calls = modules, calls
        self.nodes: list[Node] = []
        self.norms: dict[Node, nn.Module] = {}
        self.reads: dict[Node, tuple[Node, ...]] = {}

    def tail(self, result: Node, reader: Node) -> Tail | None:
        self._collect(result, reader)
        if not self.norms:
            return None
        inputs = dict.fromkeys(n for node in self.nodes for n in self.reads[node] if n not in self.reads)
        norms = {node: self.norms[node] for node in self.nodes if node in self.norms}
        return Tail(tuple(self.nodes), norms, self.reads, tuple(inputs))

    def _collect(self, node: Node, reader: Node) -> None:
        """Add a node, and the nodes before it, to the tail if only `reader` reads it."""
        if set(node.users) != {reader} or node in self.reads:
            return
        norm = self._norm(node)
        if norm is not None:
            self.norms[node], self.reads[node] = norm, (node.args[1],)  # type: ignore[assignment]
        elif _is_addition(node):
            self.reads[node] = tuple(node.args)  # type: ignore[arg-type]
            for operand in self.reads[node]:
                self._collect(operand, node)
        else:
            return
        self.nodes.append(node)

    def _norm(self, node: Node) -> nn.Module | None:
        """The BatchNorm that a node calls with statistics of its batch."""
        if node.target not in (call_norm, call_module) or len(node.args) != 2 or node.kwargs:
            return None
        norm = self.modules.get(node.args[0])  # type: ignore[arg-type]
        if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) or not has_torch_forward(norm):
            return None
        return norm if norm.training and self.calls[id(norm)] == 1 else None


def _is_addition(node: Node) -> bool:
    """Whether a node adds two tensors of one shape."""
    is_add = node.target in _ADDITIONS or (node.op == "call_method" and node.target == "add")
    if not is_add or len(node.args) != 2 or node.kwargs or not all(isinstance(a, Node) for a in node.args):
        return False
    values: list[Any] = [a.meta.get("val") for a in node.args]  # type: ignore[union-attr]
    return all(isinstance(v, Tensor) for v in values) and values[0].shape == values[1].shape
