"""Calls of `len` and `int` on sizes: other lengths run the model's code, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from support.looped_models import assert_converts_sequence


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 4)

    def steps(self, x: Tensor) -> Tensor:
        u, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for step in x:
            u = 0.5 * u + self.fc(step)
            out.append(u)
        return torch.stack(out)


class ComparesLength(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.steps(x)
        return 2 * y if len(x) > 6 else y


class ComparesVariable(Base):
    def forward(self, x: Tensor) -> Tensor:
        T = len(x)
        last = T - 1
        y = self.steps(x)
        if last >= 6:
            y = 3 * y
        return y


class ComparesInt(Base):
    def forward(self, x: Tensor) -> Tensor:
        steps: Any = int(x.shape[0])
        y = self.steps(x)
        return y if steps < 7 else -y


class Halves(Base):
    def forward(self, x: Tensor) -> Tensor:
        half = len(x) // 2
        return self.steps(x)[half:].mean(0)


class Limits(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)[-min(len(x), 3) :]


@pytest.mark.parametrize("make", [ComparesLength, ComparesVariable, ComparesInt, Halves, Limits])
def test_a_number_that_calls_of_other_lengths_use_otherwise_fixes_the_length(make: type[nn.Module]) -> None:
    net = assert_converts_sequence(make(), (sequence(5, 3, 6),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(9, 3, 6))


class Usual(Base):
    def forward(self, x: Tensor) -> Tensor:
        T = len(x)
        assert T > 0
        u, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(T):
            u = 0.5 * u + self.fc(x[t])
            out.append(2 * u if t == T - 1 else u)
        return torch.stack(out).sum(0) / T


class Folds(Base):
    def forward(self, x: Tensor) -> Tensor:
        T, N = len(x), int(x.shape[1])
        return self.steps(self.fc.weight.new_ones(1) * x).reshape(T * N, 4).view(T, N, 4).cumsum(0)


@pytest.mark.parametrize("make", [Usual, Folds])
def test_usual_numbers_leave_the_length_free(make: type[nn.Module]) -> None:
    assert_converts_sequence(make(), (sequence(5, 3, 6),), [(sequence(9, 3, 6),), (sequence(2, 3, 6),)])
