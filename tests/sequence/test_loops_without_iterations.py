"""Calls of one time step whose only iteration runs code of its own: the loop of the later ones runs no iteration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.looped_models import assert_converts_sequence


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.back = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def later(self, v: Tensor, current: Tensor) -> Tensor:
        return v / 2 + torch.tanh(self.back(v)) + current + 1


class LastState(Base):
    def forward(self, x: Tensor) -> Tensor:
        v: Any = None
        for t in range(x.shape[0]):
            v = self.fc(x[t]) if t == 0 else self.later(v, self.fc(x[t]))
        return v  # type: ignore[no-any-return]


class NormOfLaterSteps(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v: Any = None
        total: Any = 0
        for t in range(x.shape[0]):
            current = self.fc(x[t])
            v = current if t == 0 else self.later(v, self.norm(current))
            total = total + v
        return total / x.shape[0], v


class Stacked(Base):
    def forward(self, x: Tensor) -> Tensor:
        v: Any = None
        outputs = []
        for t in range(x.shape[0]):
            current = self.norm(self.fc(x[t]))
            v = current if t == 0 else self.later(v, current)
            outputs.append(v)
        return torch.stack(outputs)


class SecondState(Base):
    """A state that only the later steps set starts as a number."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v: Any = None
        trace = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            if t == 0:
                v = self.fc(x[t])
            else:
                v = self.later(v, self.fc(x[t]))
                trace = 0.9 * trace + v.relu()
        return v, trace


@pytest.mark.parametrize("make", [LastState, NormOfLaterSteps, Stacked, SecondState])
def test_equal_to_the_own_call(make: type[nn.Module]) -> None:
    assert_converts_sequence(make(), (sequence(4, 3, 6),), [(sequence(1, 3, 6),), (sequence(2, 2, 6),)])


def test_generators_and_buffers_stay() -> None:
    class Dropped(Base):
        def forward(self, x: Tensor) -> Tensor:
            v: Any = None
            for t in range(x.shape[0]):
                current = self.fc(x[t])
                v = current if t == 0 else self.later(v, nn.functional.dropout(self.norm(current), 0.5))
            return v  # type: ignore[no-any-return]

    model = Dropped().double()
    net = snnfx.convert(model, takes="sequence", example_inputs=(sequence(4, 3, 6),))
    before, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    net(sequence(1, 3, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
