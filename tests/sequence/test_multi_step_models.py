"""Models with an explicit time axis: equal to the author's own call, with kernels for the neurons."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError
from support.looped_models import assert_converts_sequence

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import layer, neuron, surrogate

from support.multi_step_models import (
    ContainerNet,
    ConvNet,
    SewNet,
    Spikformer,
    TemporalAttention,
)


def sequence(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


IMAGES, OTHERS = (sequence(6, 3, 2, 8, 8),), [(sequence(3, 2, 2, 8, 8),), (sequence(9, 4, 2, 8, 8),)]

NEURONS = {
    "IFNode": neuron.IFNode,
    "LIFNode": neuron.LIFNode,
    "ParametricLIFNode": neuron.ParametricLIFNode,
    "QIFNode": neuron.QIFNode,
    "EIFNode": neuron.EIFNode,
    "IzhikevichNode": neuron.IzhikevichNode,
    "soft": lambda: neuron.LIFNode(v_reset=None, decay_input=False),
}


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_and_layers_in_multi_step_mode(name: str) -> None:
    assert_converts_sequence(ConvNet(NEURONS[name]), IMAGES, OTHERS)


def test_residual_network_on_a_static_image() -> None:
    assert_converts_sequence(SewNet(), (sequence(3, 2, 8, 8),), [(sequence(5, 2, 8, 8),)])


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_static_image_for_any_fixed_number_of_steps(steps: int) -> None:
    assert_converts_sequence(SewNet(steps), (sequence(3, 2, 8, 8),))


@pytest.mark.parametrize("reduces", [True, False])
def test_spikformer(reduces: bool) -> None:
    assert_converts_sequence(Spikformer(reduces=reduces), IMAGES, OTHERS)


def test_attention_over_time_between_neurons() -> None:
    net = assert_converts_sequence(TemporalAttention(), (sequence(6, 3, 6),), [(sequence(4, 5, 6),)])
    assert len(net.loops) == 2


class Looping(nn.Module):
    """A neuron whose forward loops over dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.spike = surrogate.ATan()

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        out = []
        for t in range(x.shape[0]):
            v = 0.5 * v + x[t]
            s = self.spike(v - 1.0)
            v = v * (1 - s.detach())
            out.append(s)
        return torch.stack(out)


@pytest.mark.parametrize("own", [True, False])
def test_containers_around_stateless_layers(own: bool) -> None:
    assert_converts_sequence(ContainerNet(Looping(), own), IMAGES, OTHERS)


def test_containers_around_library_neurons() -> None:
    assert_converts_sequence(ContainerNet(neuron.LIFNode(step_mode="m"), False), IMAGES, OTHERS)


def test_convert_of_multi_step_neurons_names_takes() -> None:
    with pytest.raises(CaptureError, match='(?s)SNNFX204.*takes="sequence"'):
        snnfx.convert(Spikformer(), example_inputs=IMAGES)


def test_a_neuron_on_a_value_without_input_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode(step_mode="m")

        def forward(self, x: Tensor) -> Tensor:
            return x + self.lif(torch.zeros(4, 2))

    with pytest.raises(CaptureError, match=r"(?s)SNNFX234.*test_multi_step_models\.py"):
        snnfx.convert(Constant(), takes="sequence", example_inputs=(torch.rand(4, 2),))


def test_explain_lists_the_loops_with_lines_states_and_kernels() -> None:
    net = snnfx.convert(TemporalAttention().double(), takes="sequence", example_inputs=(sequence(6, 3, 6),))
    report = snnfx.explain(net)
    assert [row.slots for row in report.loops] == [("lif1.v",), ("lif2.v",)]
    assert all("multi_step_models.py" in row.where and row.iterations == "T" for row in report.loops)
    assert all("loop" in row.regions and row.kernels for row in report.loops)
    assert "2 loops over time, 2 of them with kernels" in str(report)


class MixingNeuron(nn.Module):
    """A neuron whose spikes depend on several time steps at once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.psn = layer.Linear(6, 4, step_mode="m"), neuron.MaskedPSN(k=2, T=6, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        return self.psn(self.fc(2 * x))


def test_a_neuron_that_mixes_time_runs_on_the_whole_sequence() -> None:
    assert_converts_sequence(MixingNeuron(), (sequence(6, 3, 6),))


def test_dropout_in_multi_step_mode_keeps_one_mask() -> None:
    model = nn.Sequential(layer.Linear(6, 8, step_mode="m"), layer.Dropout(0.5, step_mode="m"))
    net = snnfx.convert(model.double(), takes="sequence", example_inputs=(sequence(6, 3, 6),))
    is_zero = net(sequence(5, 3, 6)) == 0
    assert torch.equal(is_zero, is_zero[:1].expand_as(is_zero)) and is_zero.any()


CONTAINERS = {
    "linear": lambda: layer.LinearRecurrentContainer(neuron.LIFNode(), 5, 5, True),
    "of other size": lambda: layer.LinearRecurrentContainer(
        nn.Sequential(nn.Linear(5, 4), neuron.ParametricLIFNode()), 5, 4, False
    ),
    "element-wise": lambda: layer.ElementWiseRecurrentContainer(neuron.LIFNode(), lambda x, y: x + 0.5 * y),
}


class RecurrentNet(nn.Module):
    """A recurrent container in mode "m" between neurons and layers in mode "m"."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.fc, self.container = layer.Linear(3, 5, step_mode="m"), CONTAINERS[name]()
        self.container.step_mode = "m"
        features = 4 if name == "of other size" else 5
        self.out, self.lif = layer.Linear(features, 5, step_mode="m"), neuron.LIFNode(step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(5 * self.out(self.container(6 * self.fc(x))))


@pytest.mark.parametrize("name", CONTAINERS)
def test_recurrent_containers_in_multi_step_mode(name: str) -> None:
    torch.manual_seed(0)
    net = assert_converts_sequence(RecurrentNet(name), (sequence(6, 3, 3),), [(sequence(9, 2, 3),)])
    assert net.program.whole_sequences is None
    kernels = [getattr(m, "kernels", None) for m in net.region_modules().values()]
    assert sum(k is not None and k.in_use is not None for k in kernels) == 2
    y_seq, _ = net.run(sequence(6, 3, 3))
    chunks = torch.cat(list(net.stream(sequence(6, 3, 3).split(2))))
    torch.testing.assert_close(chunks, y_seq)
