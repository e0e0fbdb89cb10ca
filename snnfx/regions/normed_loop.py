"""Loops whose kernel computes the BatchNorm in training, and the additions, between a layer and the neuron.

A `Tail` is the end of a fold: BatchNorms and additions whose result only one loop reads. In training, the statistics of
a BatchNorm need the whole sequence, but the rest is element-wise. So a bound call computes the statistics in one pass
over the output of the layer, and the kernel of the loop normalises and adds as it reads its inputs. The normalised
sequence is neither stored nor read back, forward and backward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.ir.edits import add_placeholder
from snnfx.lowering.batch_norm.training_norm import GradientOwner, channel_factors, takes_channel_factors
from snnfx.lowering.elementwise.bound_step import BoundStep
from snnfx.ops.time_folding import fold_time, unfold_time
from snnfx.regions.bound_loop import BoundLoop, Results
from snnfx.regions.eager_regions import EagerLoop
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.sequence_region import RegionGraph
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.leaf_modules import call_leaf

__all__ = ["LEAST_ELEMENTS", "BoundNormedLoop", "Tail"]

_FACTORS = 3
"""Mean, scale and bias of a BatchNorm."""

LEAST_ELEMENTS = {"row-major": 1 << 20, "channels-last": 1 << 22}
"""Elements of a sequence from which on the kernel is faster than torch's BatchNorm and the neuron's kernel.

Below, the fixed costs of the statistics weigh more than the passes over memory that they save.
"""


@dataclass(frozen=True)
class Tail:
    """The end of a fold that a loop may compute.

    Args:
        nodes: BatchNorms and additions of the graph of the fold, in order; the last one is the result.
        norms: the modules of the BatchNorms among the nodes, by node.
        reads: for each node, the nodes that it reads: members of the tail, or the inputs of the tail.
        inputs: the nodes that the tail reads, without repetitions.
    """

    nodes: tuple[Node, ...]
    norms: dict[Node, nn.Module]
    reads: dict[Node, tuple[Node, ...]]
    inputs: tuple[Node, ...]

    def write(
        self,
        graph: fx.Graph,
        values: dict[Node, Node],
        normalize: Callable[[Node, Node], Node],
    ) -> Node:
        """Add the tail to a graph and return its result.

        Args:
            graph: the graph.
            values: the nodes of the graph with the inputs of the tail.
            normalize: adds a BatchNorm to the graph, from its node in the fold and its input in the graph.
        """
        values = dict(values)
        for node in self.nodes:
            operands = [values[n] for n in self.reads[node]]
            is_norm = node in self.norms
            values[node] = normalize(node, operands[0]) if is_norm else graph.call_function(operator.add, (*operands,))
        return values[self.nodes[-1]]


class BoundNormedLoop:
    """Runs a loop region together with the tails of the folds before it, from the reset state.

    Args:
        region: the region.
        constants, tensors, with_finals: as for `BoundLoop`.
        tails: for each input of the region, the tail that computes it from several arguments of a call; None for an
            input that is an argument itself.
    """

    def __init__(
        self,
        region: EagerLoop,
        constants: Sequence[Any],
        tensors: Sequence[int],
        with_finals: bool,
        tails: Sequence[Tail | None],
    ) -> None:
        self.tails = tuple(tails)
        self.norms: list[Any] = [norm for tail in tails if tail is not None for norm in tail.norms.values()]
        self.plain = BoundLoop(region, constants, tensors, with_finals)
        positions = (*tensors, *range(len(constants), len(constants) + _FACTORS * len(self.norms)))
        normed = _with_tails(region, len(constants), tails)
        self.normed = BoundLoop(normed, (*constants, *[None] * (_FACTORS * len(self.norms))), positions, with_finals)
        self.eager = [None if tail is None else _eager(tail) for tail in tails]
        self.is_plain = False
        """Whether the step with the tails has no kernel, so that torch computes them."""
        self.region = region

    def __call__(self, *arguments: Tensor) -> Results:
        """Run the loop: `(outputs [T, *], final states)`.

        Args:
            arguments: for each input of the region the sequence, or the sequences that its tail reads; then the tensors
                among the constants.
        """
        count = sum(1 if tail is None else len(tail.inputs) for tail in self.tails)
        sequences, given = list(arguments[:count]), arguments[count:]
        if self.is_plain or not self._takes_factors(sequences):
            self.region.norms_in_kernel = []
            return self.plain(*self._computed(sequences), *given)
        owner = GradientOwner()
        factors = self._factors(sequences, owner)
        results = self.normed.run_bound([*sequences, *given, *factors])
        if results is not None:
            owner.is_new = isinstance(self.normed.step, BoundStep)
            self.region.norms_in_kernel = self.norms
            return results
        results = self.normed.run_unbound([*sequences, *given, *factors])
        self.is_plain = self.normed.step is None
        return results

    def _takes_factors(self, sequences: Sequence[Tensor]) -> bool:
        """Whether every BatchNorm is called without hooks, on a sequence whose channels have factors."""
        pairs = [(sequences[i], norm) for norm, i in zip(self.norms, self._inputs_of_norms(), strict=True)]
        if not any(x.numel() >= LEAST_ELEMENTS[_memory_format(x)] for x, _ in pairs):
            return False
        return all(not has_forward_hooks(norm) and takes_channel_factors(x, norm) for x, norm in pairs)

    def _inputs_of_norms(self) -> list[int]:
        """For each BatchNorm, the position of its input among the sequences of a call."""
        found, start = [], 0
        for tail in self.tails:
            if tail is None:
                start += 1
                continue
            found += [start + tail.inputs.index(tail.reads[node][0]) for node in tail.norms]
            start += len(tail.inputs)
        return found

    def _factors(self, sequences: list[Tensor], owner: GradientOwner) -> list[Tensor]:
        """Mean, scale and bias of each BatchNorm; replaces their inputs by those of the loop."""
        factors: list[Tensor] = []
        for norm, i in zip(self.norms, self._inputs_of_norms(), strict=True):
            sequences[i], *more = channel_factors(sequences[i], norm, owner)
            factors += more
        return factors

    def _computed(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the region, with the tails computed by torch."""
        inputs, start = [], 0
        for tail, eager in zip(self.tails, self.eager, strict=True):
            if tail is None or eager is None:
                inputs.append(sequences[start])
                start += 1
                continue
            read = sequences[start : start + len(tail.inputs)]
            folded = eager(*tail.norms.values(), *map(fold_time, read))
            inputs.append(unfold_time(folded, read[0].shape[0]))
            start += len(tail.inputs)
        return inputs


def _memory_format(x_seq: Tensor) -> str:
    return "row-major" if x_seq.is_contiguous() else "channels-last"


def _eager(tail: Tail) -> fx.GraphModule:
    """The tail over folded sequences: `(*norms, *inputs) -> result`."""
    graph = fx.Graph()
    norms = {node: add_placeholder(graph, "norm") for node in tail.norms}
    inputs = {node: add_placeholder(graph, node.name) for node in tail.inputs}
    graph.output(tail.write(graph, inputs, lambda node, x: graph.call_function(call_leaf, (norms[node], x))))
    return fx.GraphModule(nn.Module(), graph)


def _with_tails(region: EagerLoop, constants: int, tails: Sequence[Tail | None]) -> EagerLoop:
    """A loop whose step computes the tails; it takes the factors of the BatchNorms behind its constants."""
    step = _step_with_tails(region.step, constants, tails)
    first = None if region.first is None else _step_with_tails(region.first, constants, tails)
    loop = EagerLoop(region.label, step, first)
    make_start = region.make_start
    assert make_start is not None
    loop.kernels = RegionKernels(
        region.label, step, first, lambda: _step_with_tails(make_start(), constants, tails), by_events=False
    )
    return loop


def _step_with_tails(step: RegionGraph, constants: int, tails: Sequence[Tail | None]) -> RegionGraph:
    graph = fx.Graph()
    placeholders = [n for n in step.graph.nodes if n.op == "placeholder"]
    of_inputs = placeholders[constants : constants + len(tails)]
    env = {n: add_placeholder(graph, n.name) for n in placeholders[:constants]}
    factors: dict[Node, tuple[Node, ...]] = {}
    for tail in tails:
        for node in tail.norms if tail is not None else ():
            factors[node] = tuple(add_placeholder(graph, name) for name in ("mean", "scale", "bias"))
    sequences: list[dict[Node, Node]] = []
    for placeholder, tail in zip(of_inputs, tails, strict=True):
        read = (placeholder,) if tail is None else tail.inputs
        sequences.append({n: add_placeholder(graph, n.name) for n in read})
    env |= {n: add_placeholder(graph, n.name) for n in placeholders[constants + len(tails) :]}

    def normalize(node: Node, x: Node) -> Node:
        mean, scale, bias = factors[node]
        scaled = graph.call_function(operator.mul, (graph.call_function(operator.sub, (x, mean)), scale))
        return graph.call_function(operator.add, (scaled, bias))

    for placeholder, tail, values in zip(of_inputs, tails, sequences, strict=True):
        env[placeholder] = values[placeholder] if tail is None else tail.write(graph, values, normalize)
    for node in step.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], env.__getitem__))
        elif node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    return RegionGraph(step, graph, class_name="RegionGraph")
