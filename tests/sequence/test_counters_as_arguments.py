"""Loops that pass the number of the step to functions: for any length where the first steps show its use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from support.looped_models import assert_converts_sequence


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 4)
        self.v: Any = None


class FirstStep(Model):
    def step(self, x: Tensor, t: int) -> Tensor:
        if t == 0:
            self.v = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        self.v = 0.5 * self.v + self.fc(x)
        return self.v

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.step(x[t], t) for t in range(x.shape[0])])


class Chosen(Model):
    def step(self, x: Tensor, u: Tensor, t: int) -> tuple[Tensor, Tensor]:
        u = 0.5 * u + self.fc(x)
        return u if t > 0 else 2 * u, u

    def forward(self, x: Tensor) -> Tensor:
        u, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            y, u = self.step(x[t], u, t)
            out.append(y)
        return torch.stack(out)


class ReadsElement(Model):
    @staticmethod
    def read(x: Tensor, t: int) -> Tensor:
        return 2 * x[t]

    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            u = 0.5 * u + self.fc(self.read(x, t))
        return u


class WritesElement(Model):
    def put(self, out: Tensor, value: Tensor, *, at: int) -> None:
        out[at] = value

    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = torch.zeros(x.shape[0], x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            u = 0.5 * u + self.fc(x[t])
            self.put(out, u, at=t)
        return out


class Neuron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v: Any = None

    def forward(self, x: Tensor, t: int) -> Tensor:
        self.v = x if t == 0 else 0.5 * self.v + x * (t + 2)
        result: Tensor = self.v
        return result


class OfModule(Model):
    def __init__(self) -> None:
        super().__init__()
        self.neuron = Neuron()

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for t in range(x.shape[0]):
            out.append(self.neuron(self.fc(x[t]), t))
        return torch.stack(out)


class Nested(Model):
    def outer(self, x: Tensor, u: Tensor, t: int) -> Tensor:
        return self.inner(x, u, step=t + 1)

    def inner(self, x: Tensor, u: Tensor, step: int) -> Tensor:
        return u / step + self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            u = self.outer(x[t], u, t)
        return u


ANY_LENGTH = [FirstStep, Chosen, ReadsElement, WritesElement, OfModule, Nested]


@pytest.mark.parametrize("make", ANY_LENGTH)
def test_equal_to_the_own_call_for_any_length(make: type[nn.Module]) -> None:
    assert_converts_sequence(make(), (sequence(4, 3, 6),), [(sequence(17, 3, 6),), (sequence(1, 2, 6),)])


class Late(Model):
    def step(self, x: Tensor, u: Tensor, t: int) -> Tensor:
        return 0.5 * u + self.fc(x) if t < 10 else u

    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            u = self.step(x[t], u, t)
        return u


class Listed(Model):
    def __init__(self) -> None:
        super().__init__()
        self.gains = [1.0] * 8 + [2.0] * 12

    def step(self, x: Tensor, u: Tensor, t: int) -> Tensor:
        return self.gains[t] * u + self.fc(x)

    forward = Late.forward


class Periodic(Model):
    def step(self, x: Tensor, u: Tensor, t: int) -> Tensor:
        return u + self.fc(x) * (t // 8)

    forward = Late.forward


class Returned(Model):
    def advance(self, x: Tensor, t: int) -> tuple[Tensor, int]:
        return self.fc(x), t

    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            y, count = self.advance(x[t], t)
            u = u + y if count < 9 else u
        return u


class Starred(Model):
    def step(self, *values: Any) -> Tensor:
        return 0.5 * values[1] + self.fc(values[0]) if values[2] < 10 else values[1]

    forward = Late.forward


class Counted(Model):
    """The method counts its calls beside the argument."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def step(self, x: Tensor, u: Tensor, t: int) -> Tensor:
        self.calls = t
        return 0.5 * u + self.fc(x) if self.calls < 10 else u

    forward = Late.forward


class ComparesSizes(Model):
    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            u = 0.5 * u + self.fc(x[t]) if t * x.size(2) < 60 else u
        return u


class ComparesLengths(Model):
    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            u = 0.5 * u + self.fc(x[t]) if t * len(u) < 30 else u
        return u


@pytest.mark.parametrize("make", [Late, Listed, Periodic, Returned, Starred, Counted, ComparesSizes, ComparesLengths])
def test_a_use_that_only_later_steps_show_fixes_the_length(make: type[nn.Module]) -> None:
    net = assert_converts_sequence(make(), (sequence(4, 3, 6),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(17, 3, 6))
