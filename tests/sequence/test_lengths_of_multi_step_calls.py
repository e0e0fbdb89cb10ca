"""Calls of SpikingJelly's multi-step modules: for any number of time steps, or with a guard of their number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from support.looped_models import assert_converts_sequence

functional = pytest.importorskip("spikingjelly.activation_based.functional")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Containers(nn.Module):
    """Layers and neurons in containers, a neuron in multi-step mode between them."""

    def __init__(self) -> None:
        super().__init__()
        self.folded = layer.SeqToANNContainer(nn.Linear(5, 6), nn.BatchNorm1d(6))
        self.neuron = neuron.LIFNode(step_mode="m")
        self.stepped = layer.MultiStepContainer(nn.Linear(6, 3), neuron.IFNode())

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        y: Tensor = self.stepped(self.neuron(self.folded(x)))
        return y


class ByFunction(Containers):
    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        folded = functional.seq_to_ann_forward(x, [self.folded[0], self.folded[1]])
        y: Tensor = functional.multi_step_forward(self.neuron(folded), [self.stepped[0], self.stepped[1]])
        return y


@pytest.mark.parametrize("make", [Containers, ByFunction])
def test_containers_convert_for_any_length(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = assert_converts_sequence(make(), (sequence(4, 3, 5),), [(sequence(7, 3, 5),), (sequence(2, 2, 5),)])
    assert net.program.whole_sequences is None


class DelayedBehindNeuron(Containers):
    """The loop behind the neuron reads older spikes, so that the number of time steps is fixed."""

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        older = [torch.zeros_like(x[0, :, :1])] * 3
        outputs = []
        for z in self.neuron(self.folded(x)):
            older = [*older[1:], z[:, :1]]
            outputs.append(z + older[0])
        return torch.stack(outputs)


@pytest.mark.parametrize("T", [2, 7])
def test_a_net_of_fixed_length_checks_the_length_of_each_call_of_a_module(T: int) -> None:
    torch.manual_seed(0)
    net = assert_converts_sequence(DelayedBehindNeuron(), (sequence(4, 3, 5),), [(sequence(4, 2, 5),)])
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(T, 3, 5))


class Alone(Containers):
    """Nothing else in the call reads the number of time steps."""

    def forward(self, x: Tensor) -> list[Tensor]:
        functional.reset_net(self)
        return list(self.neuron(x))


def test_a_list_of_outputs_of_a_module_fixes_their_number() -> None:
    net = assert_converts_sequence(Alone(), (sequence(4, 3, 5),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(7, 3, 5))
    assert "the number of time steps is fixed" in str(snnfx.explain(net))
