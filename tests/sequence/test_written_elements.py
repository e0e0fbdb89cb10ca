"""An iteration that reads back the element it has just written is a step; lists of constants are no loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.looped_models import assert_converts_sequence, spike


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Encoder(nn.Module):
    """Writes spikes of a static input, subtracts them as read back, and reads all of them in a second loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fcs = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 4)])

    def encode(self, x: Tensor) -> Tensor:
        voltage, spikes = torch.zeros_like(x), torch.zeros(*x.shape, 5, dtype=x.dtype)
        for step in range(5):
            voltage = voltage + x
            spikes[:, :, step] = spike(voltage - 0.7)
            voltage = voltage - spikes[:, :, step] * 0.9
        return spikes

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.encode(x)
        states = [[torch.zeros(x.shape[0], 4, dtype=x.dtype) for _ in range(3)] for _ in self.fcs]
        total = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for step in range(5):
            h = spikes[:, :, step]
            for i, fc in enumerate(self.fcs):
                current, volt, out = states[i]
                current = 0.5 * current + fc(3 * h)
                volt = 0.7 * volt * (1 - out) + current
                states[i] = [current, volt, spike(volt - 0.5)]
                h = states[i][2] + 0.1 * volt
            total = total + h
        return total


class Rounded(Encoder):
    """Writes into a tensor of another dtype, so that the element read is not the value written."""

    def encode(self, x: Tensor) -> Tensor:
        voltage, spikes = torch.zeros_like(x), torch.zeros(*x.shape, 5, dtype=torch.float16)
        for step in range(5):
            voltage = voltage + x
            spikes[:, :, step] = voltage / 3
            voltage = voltage - spikes[:, :, step]
        return spikes.to(x.dtype)


class Broadcast(Encoder):
    """Writes a row, and reads a matrix."""

    def encode(self, x: Tensor) -> Tensor:
        voltage, spikes = torch.zeros_like(x), torch.zeros(*x.shape, 5, dtype=x.dtype)
        for step in range(5):
            voltage = voltage + x
            spikes[:, :, step] = voltage.mean(0)
            voltage = voltage - spikes[:, :, step] * 0.9
        return spikes


class Neighbour(Encoder):
    """Reads the element of the step before."""

    def encode(self, x: Tensor) -> Tensor:
        spikes = torch.zeros(*x.shape, 5, dtype=x.dtype)
        for step in range(5):
            spikes[:, :, step] = x if step == 0 else x + 0.5 * spikes[:, :, step - 1]
        return spikes


def test_both_loops_are_steps_with_states_of_zero() -> None:
    net = assert_converts_sequence(Encoder(), (sequence(3, 6),), [(sequence(2, 6),)])
    first, second = net.loops  # none for the lists of zeros
    assert [len(first.program.slots), len(second.program.slots)] == [1, 7]
    assert all(value == 0.0 for loop in net.loops for value in loop.program.initial_values)


def test_casts_broadcasts_and_other_elements_are_not_forwarded() -> None:
    for style in (Rounded, Broadcast, Neighbour):
        assert_converts_sequence(style(), (sequence(3, 6),))
