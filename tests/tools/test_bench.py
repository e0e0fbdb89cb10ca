"""The benchmarks compare like with like: all implementations of a case compute the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import snnfx

TOOLS = Path(__file__).resolve().parents[2] / "tools"

for library in ("spikingjelly", "snntorch", "norse"):
    pytest.importorskip(library)


@pytest.fixture(scope="module")
def layers() -> Any:
    return _tool("layers")


@pytest.fixture(scope="module")
def networks() -> Any:
    return _tool("networks")


def _tool(name: str) -> Any:
    sys.path[:0] = [str(TOOLS / "bench")]
    try:
        return __import__(name)
    finally:
        del sys.path[:1]


NEURONS = ("IF", "LIF", "LIF, soft reset", "PLIF", "Leaky (snnTorch)", "LIFCell (Norse)", "user's own")


@pytest.mark.parametrize("name", NEURONS)
def test_a_neuron_and_its_peer_give_the_same_spikes(layers: Any, name: str) -> None:
    assert set(layers.NEURONS) == set(NEURONS)
    torch.manual_seed(0)
    x_seq = 1.5 * torch.rand(12, 1, 500)
    net = snnfx.convert(layers.NEURONS[name](), example_inputs=x_seq[0])
    _, run = layers.peer_of(name)
    with torch.no_grad():
        actual, expected = layers._first(net(x_seq)), run(x_seq)
    assert 0 < expected.mean() < 1
    assert (actual != expected).double().mean() < 1e-3
    assert torch.equal(run(x_seq), expected)  # it starts from the reset state each time


@pytest.mark.parametrize("name", ["CSNN", "Spiking-VGG-11"])
def test_a_network_and_its_peer_give_the_same_spikes(networks: Any, name: str) -> None:
    make, shape, _ = networks.NETWORKS[name]
    model, peer = make().eval(), make(multi_step=True).eval()
    peer.load_state_dict(model.state_dict())
    x_seq = 2 * torch.rand(3, 2, *shape)
    seen: dict[str, Any] = {}
    for side, module in (("model", model), ("peer", peer)):
        first = next(m for m in module.modules() if "LIF" in type(m).__name__)
        first.register_forward_hook(lambda m, args, y, side=side: seen.setdefault(side, []).append(y))
    with torch.no_grad():
        for x in x_seq:
            model(x)
        peer(x_seq)
    stepped, folded = torch.stack(seen["model"]), seen["peer"][0]
    assert 0 < stepped.mean() < 1
    assert (stepped != folded).double().mean() < 1e-3


@pytest.mark.parametrize("name", ["CSNN", "SEW-ResNet-18", "Spiking-VGG-11", "Spikformer-like"])
def test_the_floor_has_every_layer_but_the_neurons(networks: Any, name: str) -> None:
    model = networks.NETWORKS[name][0]()
    bare = networks.without_neurons(model)
    assert sum(p.numel() for p in bare.parameters()) == sum(p.numel() for p in model.parameters())
    assert not any("LIF" in type(m).__name__ for m in bare.modules())
    assert any("LIF" in type(m).__name__ for m in model.modules())


def test_a_case_is_measured(layers: Any) -> None:
    found = layers.measure(layers.LayerCase("LIF", 4, 1000), seconds=0.01)
    assert found["forward"].keys() == {"snnfx", "kernels alone", "SpikingJelly", "one pass"}
    assert all(t > 0 for times in (found["forward"], found["training"]) for t in times.values())


def test_kernels_alone_are_those_of_the_call(layers: Any) -> None:
    net = snnfx.convert(layers.NEURONS["LIF"](), example_inputs=torch.rand(1, 64))
    x_seq = 3 * torch.rand(5, 1, 64)
    outputs: list[torch.Tensor] = []
    again = layers._kernels_of(lambda: outputs.append(net(x_seq)))
    expected = outputs[-1].clone()
    outputs[-1].zero_()
    again()
    assert torch.equal(outputs[-1], expected) and expected.any()


@pytest.mark.parametrize("name", ["CSNN", "MLP"])
def test_neurons_fire_at_the_rate_of_the_case(name: str) -> None:
    events = _tool("events")
    make, sample, _ = events.MODELS[name]
    torch.manual_seed(0)
    model = make(torch.nn, snnfx.neuron.LIFNode)
    x_seq = torch.rand(3, 2, *sample)
    rates = events.fire_at(model, x_seq, 0.1)
    assert len(rates) == sum(isinstance(layer, snnfx.neuron.LIFNode) for layer in model)
    assert all(rate == pytest.approx(0.1, abs=0.03) for rate in rates.values())
    peer = events._peer(make, model).eval()
    with torch.no_grad():
        actual = snnfx.convert(model.eval(), example_inputs=x_seq[0])(x_seq)
        expected = peer(x_seq)
    assert (actual != expected).double().mean() < 1e-2
    assert actual.mean() == pytest.approx(rates[next(reversed(rates))], abs=0.02)
