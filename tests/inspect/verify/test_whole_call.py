"""`snnfx.verify` for nets that are converted with `takes="sequence"`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import VerificationError


class Looped(nn.Module):
    """A model that runs over time itself, with dropout in each step and a running statistic."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.fc, self.drop, self.bn = nn.Linear(3, 4), nn.Dropout(p), nn.BatchNorm1d(4)
        self.lif = snnfx.neuron.LIFNode(v_threshold=0.3)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for t in range(x.shape[0]):
            outputs.append(self.lif(self.bn(self.drop(self.fc(x[t])))))
        y = torch.stack(outputs)
        self.total.add_(y.detach().sum((0, 1)))
        return y


def converted(model: nn.Module) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(5, 2, 3)
    return snnfx.convert(model, takes="sequence", example_inputs=(x,)), x


@pytest.mark.parametrize("double", [False, True])
def test_a_net_draws_the_numbers_of_the_models_own_call(double: bool) -> None:
    model = Looped()
    net, x = converted(model)
    report = snnfx.verify(model, net, x, double=double)
    assert "same random numbers: `drop`" in str(report)


def test_every_buffer_that_the_call_changes_is_compared() -> None:
    model = Looped(0.0)
    net, x = converted(model)
    assert "total" in {c.name for c in snnfx.verify(model, net, x).comparisons}


def test_a_buffer_that_the_net_does_not_write_is_named() -> None:
    model = Looped(0.0)
    net, x = converted(model)
    run = type(net).forward

    class Lossy(type(net)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            before = model.total.clone()
            y = run(self, *args, **kwargs)
            model.total.copy_(before)
            return y

    net.__class__ = Lossy
    with pytest.raises(VerificationError, match="SNNFX404.*total"):
        snnfx.verify(model, net, x)


def test_another_dropout_probability_is_found() -> None:
    net, x = converted(Looped())
    other = copy.deepcopy(net.source)
    other.drop.p = 0.6
    with pytest.raises(VerificationError, match="SNNFX401|SNNFX411"):
        snnfx.verify(other, net, x)


def test_states_that_library_neurons_keep_in_buffers_are_not_compared() -> None:
    snntorch = pytest.importorskip("snntorch")

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.neuron = nn.Linear(6, 12), snntorch.Alpha(alpha=0.9, beta=0.8)

        def forward(self, x: Tensor) -> Tensor:
            *state, spikes = *self.neuron.reset_mem(), []
            for t in range(x.size(1)):
                spike, *state = self.neuron(self.fc(9 * x[:, t]), *state)
                spikes.append(spike)
            return torch.stack(spikes, 1).mean(1)

    model = Looped()
    net = snnfx.convert(model, takes="sequence", example_inputs=(torch.rand(4, 8, 6),))
    snnfx.verify(model, net, torch.rand(4, 11, 6))
    with torch.no_grad():
        broken = snnfx.convert(copy.deepcopy(model), takes="sequence", example_inputs=(torch.rand(4, 8, 6),))
        broken.source.fc.weight.mul_(1.5)
    with pytest.raises(VerificationError, match="SNNFX40"):
        snnfx.verify(model, broken, torch.rand(4, 11, 6))
