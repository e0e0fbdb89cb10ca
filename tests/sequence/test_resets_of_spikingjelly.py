"""`functional.reset_net` inside the forward, around modules whose states start as None."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
functional = pytest.importorskip("spikingjelly.activation_based.functional")


class Dropped(nn.Module):
    """A dropout whose mask stays for one simulation, as `reset_net` begins it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif, self.dropout = nn.Linear(6, 8), neuron.LIFNode(tau=2.0, v_threshold=0.3), layer.Dropout(0.5)

    def run(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return torch.stack([self.dropout(self.lif(self.fc(x_t))) for x_t in x])

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class DroppedTwice(Dropped):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + 2 * self.run(0.8 * x)


class DroppedConnections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = layer.DropConnectLinear(6, 8, p=0.3), neuron.LIFNode(tau=2.0, v_threshold=0.3)

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return torch.stack([self.lif(self.fc(x_t)) for x_t in x])


class MultiStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif = nn.Linear(6, 8), neuron.LIFNode(tau=2.0, v_threshold=0.3)
        self.dropout = layer.Dropout(0.5)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.lif(self.fc(x)))
        functional.reset_net(self)
        return y  # type: ignore[no-any-return]


def assert_same_call(model: nn.Module, *shapes: tuple[int, int]) -> None:
    """Outputs and gradients are those of the model's own call with the same random numbers."""
    model = model.double()
    reference, x = copy.deepcopy(model), torch.rand(5, 3, 6, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    for training in (True, False):
        net.train(training)
        reference.train(training)
        for T, N in shapes:
            x = 2 * torch.rand(T, N, 6, dtype=torch.float64)
            results = []
            for called in (net, reference):
                given = x.clone().requires_grad_()
                torch.manual_seed(1)
                y = called(given)
                if y.requires_grad:
                    y.square().sum().backward()
                results.append([y, given.grad, torch.rand(1), *(p.grad for p in called.parameters())])
                called.zero_grad()
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("model_class", [Dropped, DroppedTwice, DroppedConnections, MultiStep])
def test_a_reset_draws_new_masks(model_class: type[nn.Module]) -> None:
    assert_same_call(model_class(), (5, 3), (8, 2), (5, 3))


class Analog(nn.Module):
    """In multi-step mode, SpikingJelly computes the equations of LIFNode for its subclass LIAFNode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 8)
        self.lif = neuron.LIAFNode(act=nn.ReLU(), threshold_related=True, v_threshold=0.3, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return self.lif(self.fc(x))  # type: ignore[no-any-return]


def test_a_neuron_that_normalises_its_potential_is_not_taken_for_a_loop_over_its_single_step() -> None:
    class Normalizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.MPBNLIFNode(mpbn=True, out_features=6, step_mode="m")

        def forward(self, x: Tensor) -> Tensor:
            functional.reset_net(self)
            return self.lif(x)  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="SNNFX206"):  # its forward updates the statistics itself
        snnfx.convert(Normalizing(), takes="sequence", example_inputs=(torch.rand(5, 3, 6),))


def test_a_subclass_with_another_single_step_keeps_its_own_multi_step_call() -> None:
    assert_same_call(Analog(), (5, 3), (8, 2))
