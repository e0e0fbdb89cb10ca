"""Firing rates and recordings of `snnfx.profile`, against the model stepped in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from support.nets import CSNN, NeuronTwice, Recurrent, Residual

T, N = 6, 3


def stepped_outputs(model: nn.Module, name: str, x_seq: Tensor) -> Tensor:
    """The outputs of a module over time, `[T, N, *]`, by a hook on the stepped model."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, x, y: found.append(y.detach().clone()))
    snnfx.functional.reset_net(model)
    with torch.no_grad():
        for x in x_seq:
            model(x)
    snnfx.functional.reset_net(model)
    handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(CSNN, (1, 8, 8)), (Residual, (2, 8, 8)), (Recurrent, (6,))],
    ids=["csnn", "residual", "recurrent"],
)
def test_rates_are_those_of_the_stepped_model(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x_seq = torch.rand(T, N, *shape) * 8
    report = snnfx.profile(snnfx.convert(model), x_seq, repeats=1)
    assert report.rates
    for row in report.rates:
        y = stepped_outputs(model, row.layer, x_seq).double()
        assert row.rate == pytest.approx(float(y.mean()), abs=1e-9)
        assert row.over_time == pytest.approx(y.flatten(1).mean(1).tolist(), abs=1e-6)
        assert row.channels == pytest.approx(y.transpose(0, 2).flatten(1).mean(1).tolist(), abs=1e-6)
        assert row.neurons == y[0, 0].numel()
        assert row.silent == tuple(i for i, rate in enumerate(row.channels) if rate == 0)


def test_only_neurons_are_listed() -> None:
    report = snnfx.profile(snnfx.convert(Residual().eval()), torch.zeros(T, N, 2, 8, 8), repeats=1)
    names = {row.layer for row in report.rates}
    assert names == {"stem.2", *(f"blocks.{i}.conv{j}.2" for i in (0, 1) for j in (1, 2))}


def test_silent_and_saturated_channels_are_named() -> None:
    linear = nn.Linear(1, 4, bias=False)
    linear.weight.data = torch.tensor([[0.0], [9.0], [1.5], [9.0]])
    model = nn.Sequential(linear, snnfx.neuron.LIFNode(tau=2.0, v_threshold=1.0))
    report = snnfx.profile(snnfx.convert(model), torch.ones(T, N, 1), repeats=1)
    (row,) = report.rates
    assert (row.silent, row.saturated) == ((0,), (1, 3))
    assert row.channels[2] == pytest.approx(1 / 2)
    assert "1, 3" in str(report)


def test_each_call_of_a_neuron_has_a_rate() -> None:
    report = snnfx.profile(snnfx.convert(NeuronTwice()), torch.rand(T, N, 5) * 5, repeats=1)
    assert [row.layer for row in report.rates] == ["lif", "lif (call 2)"]


def test_values_other_than_0_and_1_are_no_spikes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), snnfx.neuron.LeakyIntegrator(tau=2.0))
    report = snnfx.profile(snnfx.convert(model), torch.rand(T, N, 3), repeats=1)
    assert report.rates == () and "No layer of spiking neurons" in str(report)


def test_recorded_layers_show_spikes_and_their_slots() -> None:
    torch.manual_seed(0)
    model = CSNN().eval()
    net, x_seq = snnfx.convert(model), torch.rand(T, N, 1, 8, 8) * 8
    report = snnfx.profile(net, x_seq, record=["features.0.2"], repeats=1)
    _, _, values = net.run(x_seq, record=("features.0.2", "features.0.2.v"))
    by_name = {recording.name: recording for recording in report.recordings}
    assert list(by_name) == ["features.0.2", "features.0.2.v"]
    for name, recording in by_name.items():
        units = values[name][:, 0].flatten(1)
        spread = torch.linspace(0, 255, 64).round().long()
        assert recording.units == 256
        assert torch.equal(torch.tensor(recording.values, dtype=units.dtype), units[:, spread])
    assert by_name["features.0.2"].spikes and not by_name["features.0.2.v"].spikes


def test_an_unknown_layer_cannot_be_recorded() -> None:
    net = snnfx.convert(CSNN())
    with pytest.raises(InputError, match="SNNFX311"):
        snnfx.profile(net, torch.rand(T, N, 1, 8, 8), record=["lif9"], repeats=1)


def test_a_model_that_runs_over_time_itself_has_rates_and_counts() -> None:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    model = nn.Sequential(layer.Linear(4, 5), neuron.LIFNode(v_threshold=0.3), layer.Linear(5, 3), neuron.IFNode())
    functional.set_step_mode(model, "m")
    x_seq = torch.rand(T, N, 4) * 4
    net = snnfx.convert(model, takes="sequence", example_inputs=x_seq)
    report = snnfx.profile(net, x_seq, record=["1"], repeats=1)
    fired = model[1](model[0](x_seq)).detach()
    functional.reset_net(model)
    assert {row.layer: row.rate for row in report.rates}["1"] == pytest.approx(float(fired.mean()))
    assert {row.layer: row.acs for row in report.operations}["2"] == int(fired.sum()) * 3
    assert torch.equal(torch.tensor(report.recordings[0].values), fired[:, 0])
