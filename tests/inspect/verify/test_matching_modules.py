"""`snnfx.verify` of a net and a model with other modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError

torch.set_num_threads(1)


class Layer(nn.Module):
    def __init__(self, unused: bool = False, monitor: bool = False) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(3, 4), snnfx.neuron.LIFNode(v_threshold=0.3)
        if unused:
            self.norm, self.auxiliary = nn.BatchNorm1d(4), nn.Sequential(nn.Linear(2, 2), snnfx.neuron.LIFNode())
        self.monitor = nn.Identity() if monitor else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif(self.fc(x))
        return y if self.monitor is None else self.monitor(y)


def pair(first: nn.Module, second: nn.Module) -> tuple[nn.Module, nn.Module]:
    second.load_state_dict(first.state_dict(), strict=False)
    return first, second


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("extra", ["unused", "monitor"])
@pytest.mark.parametrize("of_net", [False, True])
def test_modules_that_no_step_uses_may_differ(extra: str, of_net: bool, double: bool) -> None:
    plain, other = pair(Layer(), Layer(**{extra: True}))
    model, converted = (plain, other) if of_net else (other, plain)
    report = snnfx.verify(model, snnfx.convert(converted), 2 * torch.rand(5, 2, 3), double=double)
    assert report.count("state") == 1 and report.count("gradient") == 3


def test_a_layer_under_another_name_is_refused_by_name() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.lif = nn.Linear(3, 4), snnfx.neuron.LIFNode(v_threshold=0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.linear(x))

    net = snnfx.convert(Layer())
    with pytest.raises(InputError, match=r"SNNFX413[^`]*.*`fc` \(Linear\)"):
        snnfx.verify(Renamed(), net, torch.rand(4, 2, 3))
    snnfx.verify(net.source, net, torch.rand(4, 2, 3))
