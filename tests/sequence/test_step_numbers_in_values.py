"""The number of the step as a value: filled tensors, selections, factors, times of first spikes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from support.looped_models import assert_converts_sequence


class Timed(nn.Module):
    """A membrane `u`, and a value `first` that code of a subclass computes from spikes and the number of the step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc, self.dtype = nn.Linear(6, 4), dtype

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        return u, torch.full((x.shape[1], 4), -1, dtype=self.dtype)

    def membrane(self, u: Tensor, x: Tensor) -> Tensor:
        return 0.8 * u * (u <= 0.3) + self.fc(x)


class FullLike(Timed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, first = self.start(x)
        for t in range(x.shape[0]):
            u = self.membrane(u, x[t])
            first = torch.where((u > 0.3) & (first < 0), torch.full_like(first, float(t)), first)
        return first, u


class Full(Timed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, first = self.start(x)
        for t in range(x.shape[0]):
            u = self.membrane(u, x[t])
            first = torch.where((u > 0.3) & (first < 0), torch.full((x.shape[1], 4), t, dtype=self.dtype), first)
        return first, u


class NewFull(Timed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, first = self.start(x)
        for t in range(x.shape[0]):
            u = self.membrane(u, x[t])
            first = torch.where((u > 0.3) & (first < 0), x.new_full((1, 4), 2 * t), first)
        return first, u


class Where(Timed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, first = self.start(x)
        for t in range(x.shape[0]):
            u = self.membrane(u, x[t])
            first = torch.where((u > 0.3) & (first < 0), t, first)
        return first, u


class MaskedFill(Timed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, first = self.start(x)
        for t in range(x.shape[0]):
            u = self.membrane(u, x[t])
            first = first.masked_fill((u > 0.3) & (first < 0), t)
        return first, u


class Decayed(Timed):
    """Factors that are no integers; the products of integers with them are float32, as for Python numbers."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        u, first = self.start(x)
        products, kernels, powers = [], [], []
        for t in range(x.shape[0]):
            u = self.membrane(u, x[t] * (1 + t / 3))
            first = first + (u > 0.3).to(self.dtype)
            products.append(first * (0.1 * t))
            kernels.append(u * math.exp(-t / 5))
            powers.append(0.9**t * u)
        return torch.stack(products), torch.stack(kernels), sum(powers), u  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("make", [FullLike, Full, NewFull, Where, MaskedFill, Decayed])
def test_equal_to_the_own_call(make: type[Timed], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 6, dtype=torch.float64)
    assert_converts_sequence(make(dtype), (x[:4],), [(x,), (x[:1],)])


class Rooted(Timed):
    """No formula gives these numbers, so that their count is fixed."""

    def forward(self, x: Tensor) -> Tensor:
        u, _ = self.start(x)
        for t in range(x.shape[0]):
            u = self.membrane(u, x[t] * math.sqrt(t))
        return u


def test_numbers_without_a_formula_fix_their_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    net = assert_converts_sequence(Rooted(torch.float64), (x,))
    assert net.program.whole_sequences is not None and "`mul` is 0.0 in the first" in net.program.whole_sequences[0]
