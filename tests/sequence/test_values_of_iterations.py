"""Values of other iterations, numbers of iterations, and code of one mode in loops over time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.looped_models import Cell, assert_converts_sequence, spike


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Looped(nn.Module):
    """A recurrent layer; `kind` selects what a step computes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc, self.rec, self.cell = kind, nn.Linear(6, 4), nn.Linear(4, 4), Cell()

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(x)

    def delay_of_two(self, x: Tensor) -> Tensor:
        v, out = None, []
        before = earlier = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for x_t in x:
            s, v = self.cell(self.fc(x_t) + self.rec(earlier), v)
            earlier = before
            before = s
            out.append(s)
        return torch.stack(out)

    def own_element(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), torch.empty(x.shape[0], x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            v = 0.8 * v + self.fc(x[t])
            out[t] = spike(v - 1)
            v = v - out[t].detach()
        return out

    def previous_element(self, x: Tensor) -> Tensor:
        steps, samples, _ = x.shape
        v = torch.zeros(steps + 1, samples, 4, dtype=x.dtype)
        s = torch.zeros(samples, steps + 1, 4, dtype=x.dtype)
        for t in range(steps):
            v[t + 1] = 0.8 * v[t] * (1 - s[:, t]) + self.fc(x[t])
            s[:, t + 1] = spike(v[t + 1] - 1)
        return s[:, 1:].sum(1)

    def concatenated(self, x: Tensor) -> Tensor:
        s, v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), None, []
        for x_t in x:
            s, v = self.cell(F.linear(torch.cat([x_t, s], dim=-1), torch.cat([self.fc.weight, self.rec.weight], 1)), v)
            out.append(s)
        return torch.stack(out)

    def share_of_steps(self, x: Tensor) -> Tensor:
        v, total, steps = None, 0, x.shape[0]
        for t in range(steps):
            s, v = self.cell(self.fc(x[t]), v)
            total = total + self.rec(s) / steps
        return total

    def inverse_of_steps(self, x: Tensor) -> Tensor:
        v, out, scale = None, [], 1.0 / x.shape[0]
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]) * scale, v)
            out.append(s * (x.shape[0] - 1))
        return torch.stack(out)

    def time_of_spikes(self, x: Tensor) -> Tensor:
        v, steps, times = None, x.shape[0], torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(steps):
            s, v = self.cell(self.fc(x[t]), v)
            times = times + s * (t - steps)
        return times

    def first_step(self, x: Tensor) -> Tensor:
        out = []
        for t in range(x.shape[0]):
            v = self.fc(x[t]) if t == 0 else 0.9 * v + self.fc(x[t])  # noqa: F821
            s = spike(v - 1)
            v = v - s
            out.append(s)
        return torch.stack(out)

    def from_the_second_step(self, x: Tensor) -> Tensor:
        v, total = None, 0
        for t, x_t in enumerate(x):
            s, v = self.cell(self.fc(x_t), v)
            if t > 0:
                total = total + self.rec(s).softmax(-1)
        return total

    def new_constants(self, x: Tensor) -> Tensor:
        v, out = None, []
        for x_t in x:
            s, v = self.cell(self.fc(x_t) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype), v)
            out.append(s)
        return torch.stack(out)

    def branch_on_mode(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(self.fc(x[0])), []
        for x_t in x:
            v = 0.9 * v + self.fc(x_t)
            s = spike(v - 1) if self.training else (v >= 1).to(v)
            v = torch.where(s.bool(), torch.zeros_like(v), v)
            out.append(s)
        return torch.stack(out)

    def dropout(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(self.fc(x[0])), []
        for x_t in x:
            v = 0.9 * v + F.dropout(self.fc(x_t), 0.0 if self.training else 1.0, training=True)
            s = spike(v - 1)
            v = v - s
            out.append(v)
        return torch.stack(out)

    def power(self, x: Tensor) -> Tensor:
        v, total = None, 0
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            total = total + s * 2.0 ** -(t + 1)
        return total

    def exponential(self, x: Tensor) -> Tensor:
        v, total = None, 0
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            total = total + s * math.exp(-t / 4)
        return total

    def share_of_length(self, x: Tensor) -> Tensor:
        v, total = None, 0
        for t in range(len(x)):
            s, v = self.cell(self.fc(x[t]), v)
            total = total + s * ((t + 1) / len(x))
        return total


ANY_LENGTH = (
    "delay_of_two own_element previous_element concatenated share_of_steps inverse_of_steps time_of_spikes first_step "
    "from_the_second_step new_constants branch_on_mode dropout power exponential share_of_length"
).split()


@pytest.mark.parametrize("kind", ANY_LENGTH)
def test_equal_to_the_own_call_for_any_length(kind: str) -> None:
    assert_converts_sequence(Looped(kind), (sequence(7, 5, 6),), [(sequence(12, 2, 6),), (sequence(3, 2, 6),)])
