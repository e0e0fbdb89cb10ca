"""Loops in the forward around the neurons of snnTorch, Norse and SpikingJelly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.looped_models import assert_converts_sequence

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")
spikingjelly = pytest.importorskip("spikingjelly.activation_based.neuron")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
functional = pytest.importorskip("spikingjelly.activation_based.functional")


class SnnTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 8), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(8, 3), snntorch.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for step in range(x.size(0)):
            spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class Norse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif, self.fc2, self.out = nn.Linear(6, 8), norse.LIFCell(), nn.Linear(8, 3), norse.LICell()

    def forward(self, x: Tensor) -> Tensor:
        s1 = so = None
        voltages = []
        for ts in range(x.shape[0]):
            z, s1 = self.lif(20 * self.fc1(x[ts]), s1)
            v, so = self.out(self.fc2(z), so)
            voltages.append(v)
        return torch.stack(voltages).max(0).values


class SpikingJelly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 8), spikingjelly.LIFNode(tau=2.0), nn.Linear(8, 3), spikingjelly.LIFNode(tau=2.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        rate = 0.0
        for t in range(x.shape[0]):
            rate = rate + self.net(3 * x[t])
        return rate / x.shape[0]


@pytest.mark.parametrize("model_class", [SnnTorch, Norse, SpikingJelly])
def test_loop_around_library_neurons(model_class: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = model_class()
    net = snnfx.convert(copy.deepcopy(model), takes="sequence", example_inputs=(torch.rand(7, 5, 6),))
    regions = net.loops[0].regions if net.loops else net.regions
    assert sum(region.kind == "loop" for region in regions) >= 2
    for T, N in ((7, 5), (12, 3), (2, 4)):
        x = 2 * torch.rand(T, N, 6)
        expected_model = copy.deepcopy(model)
        expected, actual = expected_model(x), net(x)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        net.zero_grad()
        for y in (expected, actual):
            sum((v * v).sum() + v.sum() for v in (y if isinstance(y, tuple) else (y,))).backward()
        for (name, p), (_, q) in zip(expected_model.named_parameters(), net.named_parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4, msg=name)


class NorseSequences(nn.Module):
    """Modules of Norse that loop over time themselves."""

    def __init__(self, lifted: bool) -> None:
        super().__init__()
        if lifted:
            parts = norse.Lift(nn.Linear(6, 8)), norse.LIFRecurrent(8, 8), norse.Lift(nn.Linear(8, 3)), norse.LI()
        else:
            parts = nn.Linear(6, 8), norse.LIF(), nn.Linear(8, 3), norse.LI()
        self.net = norse.SequentialState(*parts)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.net(20 * x)
        return y


@pytest.mark.parametrize("lifted", [False, True])
def test_sequence_modules_of_norse(lifted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, longer = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((6, 3, 6), (9, 2, 6)))
    net = assert_converts_sequence(NorseSequences(lifted), (x,), [(longer,)])
    loops = [region for part in net.loops or [net] for region in part.regions if region.kind == "loop"]
    assert loops


class Recurrent(nn.Module):
    """Resets its recurrent containers itself, in front of the loop, behind it, or not at all."""

    def __init__(self, resets: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.resets, self.fc = resets, nn.Linear(6, 4)
        self.linear = layer.LinearRecurrentContainer(spikingjelly.LIFNode(tau=2.0, detach_reset=True), 4, 4)
        self.sums = layer.ElementWiseRecurrentContainer(spikingjelly.IFNode(), torch.add)

    def forward(self, x: Tensor) -> Tensor:
        if self.resets == "in front":
            functional.reset_net(self)
        out = [self.sums(self.linear(3 * self.fc(x_t))) for x_t in x]
        if self.resets == "behind":
            functional.reset_net(self)
        return torch.stack(out)


@pytest.mark.parametrize("resets", ["in front", "behind", "not"])
def test_recurrent_containers_that_forward_resets(resets: str) -> None:
    x, other = (2 * torch.rand(T, N, 6, dtype=torch.float64) for T, N in ((6, 3), (9, 2)))
    net = assert_converts_sequence(Recurrent(resets), (x,), [(other,)])
    model = Recurrent(resets).double()
    expected = copy.deepcopy(model)(x)
    again = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    for _ in range(2):
        torch.testing.assert_close(again(x), expected)
    assert net.program.whole_sequences is None


def test_a_call_of_the_model_itself_leaves_the_net_valid() -> None:
    model, x = Recurrent("in front").double(), torch.rand(6, 3, 6, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    expected = net(x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("encoder", ["ConstantCurrentLIFEncoder", "PoissonEncoder", "SpikeLatencyLIFEncoder"])
def test_encoders_of_norse_run_over_time_inside_a_call(encoder: str) -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.fc, self.lif = getattr(norse, encoder)(9), nn.Linear(6, 8), norse.LIFCell()

        def forward(self, x: Tensor) -> Tensor:
            state, out = None, []
            for spikes in self.encoder(x):
                z, state = self.lif(10 * self.fc(spikes), state)
                out.append(z)
            return torch.stack(out)

    model = Encoded()
    net = snnfx.convert(model, takes="sequence", example_inputs=(torch.rand(3, 6),))
    for N in (3, 5, 3):
        x = torch.rand(N, 6)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(net(x), expected)
