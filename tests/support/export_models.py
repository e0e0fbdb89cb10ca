"""Models and sizes for the tests of the export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx import neuron

SIZES = ((1, 1), (1, 3), (7, 1), (5, 4))


class TwoStates(nn.Module):
    """A neuron of the user's own: a potential, an adaptive threshold, a mask written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.leak = nn.Parameter(torch.tensor(0.7))
        self.v: Any = None
        self.threshold: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = torch.zeros_like(x)
            self.threshold = torch.full_like(x, 0.1)
        self.v = self.v * self.leak + x
        spike = torch.zeros_like(self.v)
        spike[self.v > self.threshold] = 1
        self.threshold = self.threshold * torch.tensor(0.9) + 0.2 * spike
        self.v = self.v - spike * self.threshold
        return spike


class OtherFirstStep(nn.Module):
    """The first step returns something else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = x * 2
            return torch.sigmoid(x)
        self.v = 0.5 * self.v + x
        return (self.v > 0.3).float()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), neuron.LIFNode(), nn.Linear(4, 3), neuron.ParametricLIFNode())


class GatedCells(nn.Module):
    """Recurrent cells of torch whose states start inside the step, and a mask written outside of the loops."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(5, 4), nn.GRUCell(4, 3)
        self.state: Any = None
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = (torch.zeros(x.shape[0], 4), torch.zeros(x.shape[0], 4))
        self.state = self.lstm(x, self.state)
        self.h = self.gru(self.state[0], self.h)
        y = self.h * 2
        y[:, 0] *= 0.5
        y[y > 0.1] = 1.0
        return y


class StartsWithOneSample(nn.Module):
    """Two states that start with a batch of 1; the second one gets the batch size a step later."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.current: Any = None
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.current, self.v = torch.zeros(1, 4), torch.zeros(1, 4)
        self.v = 0.9 * self.v + self.current
        self.current = 0.5 * self.current + self.fc(x)
        return (self.v > 0.1) * self.current


class SameConstantTwice(nn.Module):
    """The state starts as a view of a buffer that the step reads, too, and returns one value in two forms."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rest", torch.full((4,), 0.3))
        self.fc = nn.Linear(5, 4)
        self.v: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(x)
        if self.v is None:
            self.v = self.rest.detach()
        self.v = self.v + 0.5 * (self.rest - self.v + x)
        return self.v * 1, self.v
