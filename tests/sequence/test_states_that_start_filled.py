"""Loops whose state starts as a tensor of zeros or ones: where the step may start from a number instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from support.looped_models import assert_converts_sequence

STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros_like": lambda x: torch.zeros_like(x[0]),
    "zeros": lambda x: torch.zeros(x.shape[1], 5, dtype=x.dtype),
    "new_zeros": lambda x: x.new_zeros(x.shape[1], 5),
    "ones_like": lambda x: torch.ones_like(x[0]),
}
STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "operator @": lambda x, u, w: torch.sigmoid(x + u @ w),
    "@ with a computed weight": lambda x, u, w: torch.sigmoid(x + u @ (w * 2)),
    "linear": lambda x, u, w: torch.sigmoid(x + functional.linear(u, w)),
    "indexing": lambda x, u, w: x + u[:, :1] * w[0],
    "element-wise": lambda x, u, w: 0.5 * u * (u < 1) + x * w[0],
    "an inverted comparison": lambda x, u, w: u * ~(u > 1) + x * w[0],
    "a sum of comparisons": lambda x, u, w: x * ((u < 2) + (u < 1)),
    "a product of comparisons": lambda x, u, w: x + u * ((u < 2) * (u < 1)),
    "a number divided by the state": lambda x, u, w: x + 1 / (1 + 1 / (u * u)),
    "a power of the state": lambda x, u, w: x + torch.tanh(u**-1.0),
}


class Stepped(nn.Module):
    def __init__(self, start: str, step: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, 5))
        self.start, self.step = STARTS[start], STEPS[step]

    def forward(self, x: Tensor) -> Tensor:
        u, outputs = self.start(x), []
        for t in range(x.shape[0]):
            u = self.step(x[t], u, self.weight)
            outputs.append(u)
        return torch.stack(outputs)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("start", STARTS)
def test_equal_to_the_own_call(start: str, step: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(7, 3, 5, dtype=torch.float64) + 0.2
    net = assert_converts_sequence(Stepped(start, step), (x[:4],), [(x,), (x[:, :2],)])
    assert net.program.whole_sequences is None
