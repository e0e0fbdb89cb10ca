"""The call that a profile measures: the planned net, its bound inputs, and the graphs that run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from snnfx.analysis.dependence import ancestors
from snnfx.emit.emitted_graphs import REGIONS
from snnfx.inspect.profile.graph_walk import Caller, walk
from snnfx.ir.facts import REGION
from snnfx.ir.nodes import is_size, takes_from_tuple
from snnfx.ops.run_loop import run_loop
from snnfx.runtime.net import Net
from snnfx.runtime.replanning import net_for

__all__ = ["ProfiledCall", "region_of"]


@dataclass
class ProfiledCall:
    """One call of a net on bound inputs.

    Args:
        net: the net whose plan covers the inputs.
        leaves: the tensor inputs, time first.
        given: the values of carried arguments, by name.
        T: the number of time steps.
        state: the state before the first step; None: the reset state.
    """

    net: Net
    leaves: list[Tensor]
    given: dict[str, Any]
    T: int
    state: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.net = net_for(self.net, self.leaves, self.given) or self.net
        state = self.net._arguments.first_state(self.state, self.given)
        self.state = self.net._execution.starting_from_model(state)

    @property
    def is_whole_sequence(self) -> bool:
        """Whether the program is the graph of a model that runs over time itself, without regions."""
        return not self.net.program.regions and bool(self.net.loops)

    def part_of(self, node: Node) -> str:
        """The region that a node of the running graph belongs to; "" for none.

        In a model that runs over time itself, each loop is a region, and so are the operations between two loops.
        """
        return self._parts.get(node, "") if self.is_whole_sequence else region_of(node)

    @functools.cached_property
    def _parts(self) -> dict[Node, str]:
        parts: dict[Node, str] = {}
        number, is_inside = -1, False
        for node in self.net.program.graph.nodes:
            if not node.op.startswith("call") or is_size(node) or takes_from_tuple(node):
                continue
            is_loop = node.target is run_loop
            if is_loop or not is_inside:
                number += 1
            is_inside = not is_loop
            parts[node] = f"{'loop' if is_loop else 'sequence'}_{number}"
        return parts

    def resolve(self, target: str) -> Any:
        """The object of a target of an emitted graph."""
        return functools.reduce(getattr, target.split("."), self.net)

    def chunks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The slices over time that the call runs one after the other: `(first step, inputs)`."""
        length = self.net._execution.plans.chunk_length(self.leaves, self.T, self.state) or self.T
        varying = self.net.varying_inputs
        for start in range(0, self.T, length):
            yield start, [x[start : start + length] if v else x for x, v in zip(self.leaves, varying, strict=True)]

    def run(
        self,
        call: Caller,
        graph: Graph | None = None,
        regions: Mapping[str, Any] | None = None,
        start: Callable[[list[Tensor], Any], None] | None = None,
    ) -> list[Any]:
        """Run the call node by node and return its outputs, chunk by chunk.

        Args:
            call: runs each call node.
            graph: another form of the graph with state; None: the one that a call runs.
            regions: the region modules of that form, by the target that it gives them.
            start: called with the inputs and the state before each chunk.
        """
        if self.is_whole_sequence:
            return [self._run_program(call)]
        executable, net = self.net._executable, self.net
        modules = regions or {}

        def resolve(target: str) -> Any:
            return modules[target] if target in modules else self.resolve(target)

        emitted = executable.graphs.emitted
        first = emitted.get((net.training, "first")) if net.persistent_state.is_reset(self.state) else None
        plain = emitted.get((net.training, "plain"))
        chunks = list(self.chunks())
        state, outputs = self.state, []
        if first is not None:
            at_first = net._arguments.at_step(self.leaves, 0)
            flat, state, _ = walk(first, self.resolve, self._inputs(first, at_first, self.state, 0, 1), call)
            outputs.append(flat)
            chunks = [(1, net._arguments.from_step(self.leaves, 1))] if self.T > 1 else []
        elif graph is None and plain is not None and state is None and len(chunks) == 1:
            return [walk(plain, resolve, self._inputs(plain, self.leaves, None, 0, self.T), call)]
        form = graph or emitted[net.training, "main"]
        for index, (step, leaves) in enumerate(chunks):
            stop = chunks[index + 1][0] if index + 1 < len(chunks) else self.T
            if start is not None:
                start(leaves, state)
            flat, state, _ = walk(form, resolve, self._inputs(form, leaves, state, step, stop), call)
            outputs.append(flat)
        return outputs

    def _inputs(self, graph: Graph, leaves: list[Tensor], state: Any, start: int, stop: int) -> dict[str, Any]:
        names = [node.name for node in graph.nodes if node.op == "placeholder"]
        device = self.leaves[0].device if self.leaves else torch.device("cpu")
        values = [*leaves, state, torch.arange(start, stop, device=device)]
        if len(names) < len(values) and names[len(leaves) :] == ["time"]:
            del values[len(leaves)]
        return dict(zip(names, values, strict=False))

    def _run_program(self, call: Caller) -> Any:
        """Run the graph of a model that runs over time itself, from the reset state."""
        program = self.net.program
        inputs: dict[str, Any] = dict(zip((n.name for n in program.input_nodes()), self.leaves, strict=True))
        initial = {
            node.name: (self.state or {}).get(slot.name, value)
            for node, slot, value in zip(program.slot_nodes(), program.slots, program.initial_values, strict=True)
        }
        pending = {name: value for name, value in initial.items() if isinstance(value, Node)}
        if pending:
            values = _values_of(program.graph, list(pending.values()), program.resolve, inputs)
            initial.update(zip(pending, values, strict=True))
        return walk(program.graph, program.resolve, {**inputs, **initial}, call)[0]


def _values_of(graph: Graph, wanted: list[Node], resolve: Callable[[str], Any], inputs: Mapping[str, Any]) -> list[Any]:
    """The values of some nodes of a graph, running only their ancestors."""
    needed = ancestors(wanted)
    part = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in wanted))
    named = {copies[n].name: inputs[n.name] for n in needed if n.name in inputs}
    return list(walk(part, resolve, named, lambda node, function, args, kwargs: function(*args, **kwargs)))


def region_of(node: Node) -> str:
    """The region that a node of an emitted graph runs, or belongs to; "" for none."""
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and str(operand.target).startswith(f"{REGIONS}."):
            return str(operand.target).rpartition(".")[2]
    if node.op.startswith("call") and not is_size(node) and node.all_input_nodes:
        return str(REGION.of(node))
    return ""
