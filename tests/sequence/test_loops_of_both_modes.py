"""Models whose loops differ in training: each mode runs its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import snnfx


class LeakierInTraining(nn.Module):
    """Two loops whose steps differ in training, around a product over time."""

    def __init__(self, T: int = 6) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(T, T))

    def _accumulated(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        values = []
        for t in range(6):
            v = 0.5 * v + x[t]
            if self.training:
                v = v - v.sigmoid()
            values.append(v)
        return torch.stack(values)

    def forward(self, x: Tensor) -> Tensor:
        x = self._accumulated(x)
        return self._accumulated((self.mixing @ x.flatten(1)).view(x.shape))


def test_each_mode_runs_the_loops_captured_in_it() -> None:
    torch.manual_seed(0)
    model = LeakierInTraining().double()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    for training in (True, False):
        torch.testing.assert_close(net.train(training)(x), model.train(training)(x))


def test_each_mode_runs_the_loops_of_any_length_captured_in_it() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            v, values = torch.zeros_like(x[0]), []
            for t in range(x.shape[0]):
                v = 0.5 * v + x[t] - (v.sigmoid() if self.training else 0.0)
                values.append(v)
            y = torch.stack(values)
            return y.softmax(0) * y

    model = Scaled()
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    for training in (True, False):
        torch.testing.assert_close(net.train(training)(x), model.train(training)(x))
