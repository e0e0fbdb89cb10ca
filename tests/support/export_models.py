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
