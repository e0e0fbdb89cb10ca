"""NIR graphs of snnTorch, Norse and SpikingJelly are imported, and they import those of snnfx, with equal spikes.

Where the libraries differ from NIR: Norse writes seconds with `dt=1.0` only, reads LIF with `r = 1` only and no LI.
snnTorch reads no recurrent graphs with nirtorch 2.6, not even its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from support.stepping import step_model

nir = pytest.importorskip("nir")
pytest.importorskip("nirtorch")


def sequence() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(30, 3, 5) * 6


def graph_of(model: nn.Module, path: Path, **options: Any) -> tuple[Any, Tensor]:
    """The graph that snnfx writes, and the spikes of the net."""
    x_seq = sequence()
    net = snnfx.convert(model, example_inputs=x_seq[0]).eval()
    return nir.read(snnfx.export(net, path / "net.nir", x_seq, **options)), net(x_seq).detach()


def stepped_with_state(model: nn.Module) -> Tensor:
    state, outputs = None, []
    for x in sequence():
        y, state = model(x, state)
        outputs.append(y.detach())
    return torch.stack(outputs)


def assert_same_spikes(actual: Tensor, expected: Tensor) -> None:
    assert expected.any()
    torch.testing.assert_close(actual.detach().to(expected), expected.detach())


def leaky(**more: Any) -> Any:
    snn = pytest.importorskip("snntorch")
    return snn.Leaky(beta=torch.full((4,), 0.9), init_hidden=True, reset_mechanism="zero", reset_delay=False, **more)


def test_graph_of_snntorch() -> None:
    snn = pytest.importorskip("snntorch")
    export = pytest.importorskip("snntorch.export_nir").export_to_nir
    options: dict[str, Any] = {"init_hidden": True, "reset_mechanism": "zero", "reset_delay": False}
    synaptic = snn.Synaptic(torch.full((3,), 0.8), torch.full((3,), 0.9), threshold=torch.ones(3), **options)
    model = nn.Sequential(nn.Linear(5, 4), leaky(threshold=torch.ones(4)), nn.Linear(4, 3), synaptic)
    graph = export(model, sequence()[0], ignore_dims=[0])
    snnfx.functional.reset_net(model)
    assert_same_spikes(step_model(snnfx.from_nir(graph), sequence()), step_model(model, sequence()))


def test_recurrent_graph_of_snntorch() -> None:
    snn = pytest.importorskip("snntorch")
    export = pytest.importorskip("snntorch.export_nir").export_to_nir
    options: dict[str, Any] = {"init_hidden": True, "reset_mechanism": "zero", "reset_delay": False}
    model = nn.Sequential(nn.Linear(5, 4), snn.RLeaky(beta=0.9, linear_features=4, **options))
    graph = export(model, sequence()[0], ignore_dims=[0])
    snnfx.functional.reset_net(model)
    assert_same_spikes(step_model(snnfx.from_nir(graph), sequence()), step_model(model, sequence()))


def test_snntorch_reads_the_file(tmp_path: Path) -> None:
    importer = pytest.importorskip("snntorch.import_nir").import_from_nir
    layers = [nn.Linear(5, 4), neuron.LIFNode(decay_input=False), nn.Linear(4, 3), neuron.CUBALIFNode()]
    graph, spikes = graph_of(nn.Sequential(*layers), tmp_path)
    assert_same_spikes(stepped_with_state(importer(graph)), spikes)


@pytest.mark.parametrize("recurrent", [False, True])
def test_neurons_of_snntorch_are_recognised(recurrent: bool, tmp_path: Path) -> None:
    snn = pytest.importorskip("snntorch")
    options: dict[str, Any] = {"init_hidden": True, "reset_mechanism": "zero", "reset_delay": False}
    cell = snn.RLeaky(beta=0.9, linear_features=4, **options) if recurrent else leaky()
    graph, spikes = graph_of(nn.Sequential(nn.Linear(5, 4), cell), tmp_path)
    assert graph.nodes["1"].v_threshold.tolist() == [1.0] * 4
    assert_same_spikes(step_model(snnfx.from_nir(graph), sequence()), spikes)


def test_synaptic_neurons_of_snntorch_are_recognised(tmp_path: Path) -> None:
    snn = pytest.importorskip("snntorch")
    options: dict[str, Any] = {"init_hidden": True, "reset_mechanism": "zero", "reset_delay": False}
    model = nn.Sequential(nn.Linear(5, 4), snn.Synaptic(0.5, 0.8, learn_alpha=True, **options))
    graph, spikes = graph_of(model, tmp_path)
    assert type(graph.nodes["1"]).__name__ == "CubaLIF"
    assert_same_spikes(step_model(snnfx.from_nir(graph), sequence()), spikes)


def test_graph_of_norse() -> None:
    norse = pytest.importorskip("norse.torch")
    lif = norse.LIFBoxParameters(torch.full((4,), 100.0), torch.zeros(4), torch.full((4,), 0.3))
    readout = norse.LIBoxParameters(torch.full((3,), 100.0), torch.zeros(3))
    layers = [nn.Linear(5, 4), norse.LIFBoxCell(lif), nn.Linear(4, 3), norse.LIBoxCell(readout)]
    model = norse.SequentialState(*layers)
    graph = pytest.importorskip("norse.torch.utils.export_nir").to_nir(model, sequence()[0], dt=1.0)
    assert_same_spikes(step_model(snnfx.from_nir(graph, dt=1e-3), sequence()), stepped_with_state(model))


def test_norse_reads_the_file(tmp_path: Path) -> None:
    norse = pytest.importorskip("norse.torch")
    layers = [nn.Linear(5, 4), neuron.LIFNode(v_threshold=0.3), nn.Linear(4, 3), neuron.LIFNode(v_threshold=0.1)]
    graph, spikes = graph_of(nn.Sequential(*layers), tmp_path, dt=1e-3)
    assert_same_spikes(stepped_with_state(norse.from_nir(graph, dt=1e-3)), spikes)


def test_graph_of_spikingjelly() -> None:
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    layers = [nn.Linear(5, 4), sj.LIFNode(tau=3.0), nn.Linear(4, 4), sj.CUBALIFNode(), nn.Linear(4, 3), sj.IFNode()]
    model = nn.Sequential(*layers)
    graph = exchange.export_to_nir(model, sequence()[0])
    snnfx.functional.reset_net(model)
    assert_same_spikes(step_model(snnfx.from_nir(graph), sequence()), step_model(model, sequence()))


def test_spikingjelly_reads_the_file(tmp_path: Path) -> None:
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    layers = [
        nn.Linear(5, 4),
        neuron.LIFNode(),
        nn.Linear(4, 4),
        neuron.CUBALIFNode(),
        nn.Linear(4, 3),
        neuron.IFNode(),
    ]
    graph, spikes = graph_of(nn.Sequential(*layers), tmp_path)
    assert_same_spikes(stepped_with_state(exchange.import_from_nir(graph)), spikes)
