"""Benchmark networks whose neurons fire at a given rate: layers by events, against the floor and SpikingJelly.

The floor is the one of the suite `networks`: all layers without the neurons, dense, in the faster of the two memory
formats. The statistics of each BatchNorm are those of the input, so that the rates in training and inference agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import networks
import torch
from timing import alternate
from torch import Tensor, nn

from snnfx.functional import reset_net
from snnfx.lowering.events.layer_decisions import latest_decision
from snnfx.neuron import LIFNode
from snnfx.surrogate import ATan

__all__ = ["CASES", "MODELS", "QUICK", "EventCase", "fire_at", "measure"]


@dataclass(frozen=True)
class EventCase:
    """One benchmark case: a key of `MODELS`, on inputs `[T, N, ...]`, and the firing rate of all neurons."""

    network: str
    T: int
    N: int
    rate: float


def _csnn(library: Any, lif: Callable[[], nn.Module]) -> nn.Module:
    """Three convolutions of 64 channels on 32x32 pixels with two channels, and a linear layer."""
    layers: list[nn.Module] = []
    for channels in (2, 64, 64):
        layers += [library.Conv2d(channels, 64, 3, padding=1, bias=False), library.BatchNorm2d(64), lif()]
    return nn.Sequential(*layers, library.MaxPool2d(2), library.Flatten(), library.Linear(16384, 256), lif())


def _mlp(library: Any, lif: Callable[[], nn.Module]) -> nn.Module:
    """Three linear layers with 1024 neurons each."""
    return nn.Sequential(
        library.Linear(512, 1024), lif(), library.Linear(1024, 1024), lif(), library.Linear(1024, 1024), lif()
    )


MODELS: dict[str, tuple[Callable[[Any, Callable[[], nn.Module]], nn.Module], tuple[int, ...], bool]] = {
    "CSNN": (_csnn, (2, 32, 32), False),
    "MLP": (_mlp, (512,), True),
}
"""Constructor from a library of layers and one of neurons, shape of a sample, and whether the inputs are spikes too."""

_SHAPES = (("CSNN", 8, 16), ("CSNN", 16, 1), ("MLP", 16, 64))
QUICK = (EventCase("CSNN", 16, 1, 0.07), EventCase("MLP", 16, 64, 0.2))
CASES = tuple(EventCase(*shape, rate) for shape in _SHAPES for rate in (0.05, 0.07, 0.1, 0.2))


def measure(case: EventCase, seconds: float) -> dict[str, Any]:
    """Median milliseconds by implementation, the rate of each neuron, and the density that each layer reads."""
    make, sample, takes_spikes = MODELS[case.network]
    torch.manual_seed(0)
    model = make(nn, lambda: LIFNode(tau=2.0, surrogate_function=ATan(), detach_reset=True))
    x_seq = torch.rand(case.T, case.N, *sample)
    if takes_spikes:
        x_seq = (x_seq < case.rate).float()
    rates = fire_at(model, x_seq, case.rate)
    runs = networks.runs_of_model(model, _peer(make, model), x_seq)
    calls = {name: networks.inference_call(*run, x_seq) for name, run in runs.items()}
    inference = networks.with_lower_bound(alternate(calls, seconds, warm_up=4))
    densities = _densities(model)
    calls = {name: networks.training_call(*run, x_seq) for name, run in runs.items()}
    training = networks.with_lower_bound(alternate(calls, seconds, warm_up=4))
    return {
        "case": asdict(case),
        "rates": rates,
        "layers": densities,
        "inference": inference,
        "training": training,
    }


def fire_at(model: nn.Module, x_seq: Tensor, rate: float) -> dict[str, float]:
    """Set the statistics of a chain's norms and the thresholds of its neurons, for a firing rate; returns the rates."""
    rates: dict[str, float] = {}
    value = x_seq
    with torch.no_grad():
        for name, layer in model.named_children():
            if isinstance(layer, LIFNode):
                value = _with_threshold(layer, value, rate)
                rates[name] = value.mean().item()
                continue
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum, momentum = 1.0, layer.momentum
                layer.train()(value.flatten(0, 1))
                layer.momentum = momentum
                layer.eval()
            value = layer(value.flatten(0, 1)).unflatten(0, (len(x_seq), -1))
    return rates


def _with_threshold(neuron: LIFNode, x_seq: Tensor, rate: float) -> Tensor:
    """The spikes of a neuron whose threshold is set by bisection."""
    low, high = 0.0, 4.0 * x_seq.max().item()
    spikes = x_seq
    for _ in range(16):
        neuron.v_threshold = (low + high) / 2
        reset_net(neuron)
        spikes = torch.stack([neuron(x) for x in x_seq])
        low, high = (neuron.v_threshold, high) if spikes.mean() > rate else (low, neuron.v_threshold)
    reset_net(neuron)
    return spikes


def _peer(make: Callable[[Any, Callable[[], nn.Module]], nn.Module], model: nn.Module) -> nn.Module:
    """The network in SpikingJelly's multi-step form, with the same weights and thresholds."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    peer = make(layer, lambda: neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True))
    peer.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.modules(), peer.modules(), strict=False):
        if isinstance(ours, LIFNode):
            assert isinstance(theirs, neuron.LIFNode)
            theirs.v_threshold = ours.v_threshold
    functional.set_step_mode(peer, "m")
    return peer


def _densities(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By layer that reads spikes: how its latest call ran, at which density and crossover."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        decision = latest_decision(layer.weight) if isinstance(layer, nn.Linear | nn.Conv2d) else None
        if decision is not None:
            found[name] = asdict(decision)
    return found
