"""`FirstNeuronStep`: the first step of a neuron by a kernel, inside a loop that runs step by step.

A loop with products runs step by step where that is faster, for very few steps. Its neurons are then a dozen small
operations each, forward and backward. The kernel of a loop of the neuron alone computes the same in one call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.lowering.elementwise.bound_step import BoundStep
from snnfx.regions.bound_loop import BoundLoop
from snnfx.regions.eager_regions import EagerLoop
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.sequence_region import RegionGraph
from snnfx.state.step_calls import call_stateful, initial_value

__all__ = ["FirstNeuronStep", "with_neuron_kernels"]


class FirstNeuronStep:
    """Runs `call_stateful` from the reset state: `(output, next states)`.

    The caller guarantees that the settings of the neuron are those of the first call.

    Args:
        neuron: the neuron, a registered module.
        slots: the number of its states.
    """

    def __init__(self, neuron: nn.Module, slots: int) -> None:
        self.__name__ = "first_neuron_step"  # torch.fx writes calls of functions by name
        step, self._first = _graph(slots, "step"), _graph(slots, "first")
        loop = EagerLoop(type(neuron).__name__, step, self._first)
        loop.kernels = RegionKernels(loop.label, step, self._first, lambda: _graph(slots, "start"))
        self._neuron, self._loop = neuron, BoundLoop(loop, (neuron,))

    def __call__(self, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Run the kernel, or the operations of the neuron if it has none."""
        loop = self._loop
        if loop.bindings and not isinstance(loop.step, BoundStep):
            (y,), state = self._first.forward(self._neuron, x)
            return y, state
        (y_seq,), state = loop(x.unsqueeze(0))
        return y_seq.squeeze(0), state


def with_neuron_kernels(graph: fx.Graph, modules: Mapping[int, nn.Module]) -> fx.Graph | None:
    """A copy of the graph of a first step whose neurons run by kernels; None if it has none.

    Args:
        graph: the graph.
        modules: the modules among its arguments, by position.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    placeholders = [n for n in copy.nodes if n.op == "placeholder"]
    neurons = {placeholders[k]: module for k, module in modules.items()}
    found = [n for n in copy.nodes if n.target is call_stateful and _starts_from_reset(n) and n.args[0] in neurons]
    for node in found:
        neuron, state, x = cast("tuple[Node, tuple[Node, ...], Node]", node.args)
        kernel = FirstNeuronStep(neurons[neuron], len(state))
        with copy.inserting_before(node):
            node.replace_all_uses_with(copy.create_node("call_function", kernel, (x,), name=f"{node.name}_kernel"))
        copy.erase_node(node)
        for initial in dict.fromkeys(state):
            if not initial.users:
                copy.erase_node(initial)
    return copy if found else None


def _starts_from_reset(call: Node) -> bool:
    """Whether a neuron with one input starts from its own initial values."""
    if len(call.args) != 3 or call.kwargs or not isinstance(call.args[1], tuple) or not isinstance(call.args[2], Node):
        return False
    neuron, state, x = cast("tuple[Node, tuple[Any, ...], Node]", call.args)
    return bool(state) and all(
        isinstance(value, Node) and value.target is initial_value and value.args == (neuron, k, x) and not value.kwargs
        for k, value in enumerate(state)
    )


def _graph(slots: int, part: str) -> RegionGraph:
    """The step of a neuron, its first step, or its states before and after the first step ("start")."""
    graph = fx.Graph()
    neuron, x = graph.placeholder("neuron"), graph.placeholder("x")
    if part == "step":
        given = graph.placeholder("state")
        state = tuple([graph.call_function(operator.getitem, (given, k)) for k in range(slots)])
    else:
        state = tuple([graph.call_function(initial_value, (neuron, k, x)) for k in range(slots)])
    results = graph.call_function(call_stateful, (neuron, state, x))
    y, after = (graph.call_function(operator.getitem, (results, k)) for k in range(2))
    states = tuple([graph.call_function(operator.getitem, (after, k)) for k in range(slots)])
    graph.output((state, states) if part == "start" else ((y,), states))
    return RegionGraph(nn.Module(), graph)
