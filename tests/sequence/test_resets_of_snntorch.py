"""Resets of all neurons of snnTorch inside the forward: `snntorch.utils.reset` and the class methods behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import snnfx

snntorch = pytest.importorskip("snntorch")
utils = pytest.importorskip("snntorch.utils")


@pytest.fixture(autouse=True)
def neurons_of_this_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library resets all neurons of the process; those of other tests may be in any state."""
    torch.manual_seed(0)
    monkeypatch.setattr(snntorch.SpikingNeuron, "instances", [])
    yield


class Hidden(nn.Module):
    """The loop of the tutorials with stored states."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 8), snntorch.Leaky(beta=0.9, threshold=0.5, init_hidden=True)
        self.fc2, self.lif2 = nn.Linear(8, 3), snntorch.Synaptic(alpha=0.8, beta=0.7, init_hidden=True, output=True)

    def run(self, x: Tensor) -> Tensor:
        return torch.stack([self.lif2(self.fc2(self.lif1(self.fc1(x_t))))[-1] for x_t in x])

    def forward(self, x: Tensor) -> Tensor:
        utils.reset(self)
        return self.run(x)


class ResetsBetweenLoops(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        utils.reset(self)
        first = self.run(x)
        utils.reset(self)
        return first + 2 * self.run(x * 0.7)


class ResetsAtTheEnd(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        out = self.run(x)
        utils.reset(self)
        return out


class DetachesAtEachStep(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        utils.reset(self)
        out = []
        for x_t in x:
            out.append(self.lif2(self.fc2(self.lif1(self.fc1(x_t))))[-1])
            snntorch.Leaky.detach_hidden()
        return torch.stack(out)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]


@pytest.mark.parametrize("model_class", [Hidden, ResetsBetweenLoops, ResetsAtTheEnd, DetachesAtEachStep])
def test_the_forward_resets_or_detaches_all_neurons(model_class: type[nn.Module]) -> None:
    model, reference = model_class(), model_class()
    reference.load_state_dict(model.state_dict())
    net = snnfx.convert(model, takes="sequence", example_inputs=(torch.rand(5, 3, 6),))
    for T, N in ((5, 3), (8, 2), (5, 3)):
        x = 2 * torch.rand(T, N, 6)
        for actual, expected in zip(run(net, x), run(reference, x), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_capture_leaves_the_states_of_all_neurons() -> None:
    model, other = Hidden(), Hidden()
    for each in (model, other):
        each.run(torch.rand(5, 3, 6))
    states = [[n.mem for n in (each.lif1, each.lif2)] for each in (model, other)]
    neurons = snntorch.SpikingNeuron.instances
    before = [*neurons]
    snnfx.convert(model, takes="sequence", example_inputs=(torch.rand(5, 3, 6),))
    assert snntorch.SpikingNeuron.instances is neurons
    assert all(a is b for a, b in zip(neurons, before, strict=True))
    for each, potentials in zip((model, other), states, strict=True):
        assert each.lif1.mem is potentials[0]
        assert each.lif2.mem is potentials[1]
        assert potentials[0].requires_grad


def test_a_step_detaches_the_states() -> None:
    class Step(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            y = self.lif1(self.fc1(x))
            self.lif1.mem.detach_()
            return y  # type: ignore[no-any-return]

    class Stepped(Step):
        def forward(self, x: Tensor) -> Tensor:
            utils.reset(self)
            return torch.stack([Step.forward(self, x_t) for x_t in x])

    model, reference = Step(), Stepped()
    reference.load_state_dict(model.state_dict())
    x = 2 * torch.rand(5, 3, 6)
    for actual, expected in zip(run(snnfx.convert(model), x), run(reference, x), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
