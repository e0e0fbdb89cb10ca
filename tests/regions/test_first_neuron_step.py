"""The first step of a neuron by a kernel, in loops that run step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import snnfx
from snnfx.lowering.elementwise.bound_step import BoundStep
from snnfx.regions.first_neuron_step import FirstNeuronStep, with_neuron_kernels
from snnfx.regions.sequence_region import RegionGraph
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_stateful, initial_value

NEURONS = {
    "IF, hard reset": snnfx.neuron.IFNode,
    "LIF, soft reset": lambda: snnfx.neuron.LIFNode(tau=3.0, v_reset=None, detach_reset=True),
    "LIF from another potential": lambda: snnfx.neuron.LIFNode(v_reset=-0.3),
    "a learned time constant": snnfx.neuron.ParametricLIFNode,
}


def first_step(neuron: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    adapter = adapter_of(neuron)
    assert adapter is not None
    y, state = adapter.step(neuron, adapter.initial(neuron, x), x)
    return y, tuple(state)


def results_of(step: Any, neuron: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, states, and their gradients."""
    leaf = x.clone().requires_grad_()
    y, state = step(leaf)
    loss = (y * torch.arange(y.numel()).view_as(y)).sum() + sum((s * s).sum() for s in state)
    return [y.detach(), *(s.detach() for s in state), *torch.autograd.grad(loss, [leaf, *neuron.parameters()])]


@pytest.mark.parametrize("kind", NEURONS)
def test_the_kernel_equals_the_neuron(kind: str) -> None:
    neuron = NEURONS[kind]().double()
    kernel = FirstNeuronStep(neuron, 1)
    for shape in ((3, 5), (3, 5), (3, 5), (2, 4, 6), (1, 7)):  # from the second call of a shape on, it is bound
        x = torch.randn(shape, dtype=torch.float64) * 2
        expected = results_of(lambda v: first_step(neuron, v), neuron, x)
        found = results_of(kernel, neuron, x)
        assert isinstance(kernel._loop.step, BoundStep)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def step_graph(state_is_initial: bool) -> fx.Graph:
    graph = fx.Graph()
    neuron, weight, x = graph.placeholder("neuron"), graph.placeholder("weight"), graph.placeholder("x")
    current = graph.call_function(torch.mul, (x, weight))
    read = current if state_is_initial else x
    initial = graph.call_function(initial_value, (neuron, 0, read))
    results = graph.call_function(call_stateful, (neuron, (initial,), current))
    graph.output(results)
    return graph


def test_the_neurons_of_a_graph_are_replaced_and_its_results_stay() -> None:
    neuron, weight, x = snnfx.neuron.LIFNode(), torch.tensor(2.0), torch.rand(4, 3)
    graph = step_graph(state_is_initial=True)
    found = with_neuron_kernels(graph, {0: neuron})
    assert found is not None
    assert any(n.target is call_stateful for n in graph.nodes)  # the graph itself stays
    targets = [n.target for n in found.nodes]
    assert call_stateful not in targets
    assert initial_value not in targets
    y, (v,) = RegionGraph(nn.Module(), found).forward(neuron, weight, x)
    expected, (potential,) = first_step(neuron, x * weight)
    assert torch.equal(y, expected)
    torch.testing.assert_close(v, potential)


def test_a_neuron_that_starts_from_another_state_stays() -> None:
    assert with_neuron_kernels(step_graph(state_is_initial=False), {0: snnfx.neuron.LIFNode()}) is None


def test_a_neuron_of_another_step_stays() -> None:
    assert with_neuron_kernels(step_graph(state_is_initial=True), {1: snnfx.neuron.LIFNode()}) is None
