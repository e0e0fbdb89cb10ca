"""Models whose forward runs over time itself, and their oracle: the model's own call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import snnfx
from support.stepping import assert_same_run, fresh_copy, run_net


class Spike(torch.autograd.Function):
    """A step with the derivative of a fast sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + 10 * x.abs()) ** 2


spike = Spike.apply


class Cell(nn.Module):
    """A leaky neuron that takes and returns its membrane potential, None at first."""

    def __init__(self, decay: float = 0.8) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(decay))

    def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if v is None:
            v = torch.zeros_like(x)
        v = self.decay * v + x
        s = spike(v - 1)
        return s, v - s


class TwoLayers(nn.Module):
    """The loop of the snnTorch tutorials: two layers, spikes and potentials in lists."""

    def __init__(self, features: int = 6, hidden: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(features, hidden), Cell()
        self.fc2, self.lif2 = nn.Linear(hidden, classes), Cell()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = mem2 = None
        spikes, potentials = [], []
        for step in range(x.shape[0]):
            spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes, 0), torch.stack(potentials, 0)


def assert_converts_sequence(
    model: nn.Module, example: Sequence[Tensor], others: Sequence[Sequence[Tensor]] = (), **options: Any
) -> snnfx.Net:
    """Convert with `takes="sequence"`: outputs, gradients and buffers are those of the model's own call."""
    model = model.double()
    net = snnfx.convert(fresh_copy(model), takes="sequence", example_inputs=tuple(example), **options)
    for training in (True, False):
        for inputs in (example, *others):
            expected_model = fresh_copy(model).train(training)
            net.load_state_dict(copy.deepcopy(model.state_dict()))
            net.train(training)
            expected = run_net(expected_model, *inputs)
            actual = run_net(net, *inputs)
            actual.buffers = {k: v for k, v in actual.buffers.items() if k in expected.buffers}
            assert_same_run(actual, expected, 1e-9)
    return net
