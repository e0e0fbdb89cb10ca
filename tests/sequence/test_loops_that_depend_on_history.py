"""Loops whose later iterations differ from the first ones: equal to their own call, at the length of the example."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
import torch
from torch import Tensor, nn

from snnfx.errors import CaptureError, InputError
from support.looped_models import assert_converts_sequence, spike


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Fires(nn.Module):
    """Counts its steps in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.v = 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v, self.count = torch.zeros_like(x), 0
        self.count += 1
        self.v = 0.9 * self.v + (x if self.count < 6 else 0.5 * x)
        s = spike(self.v - 1)
        self.v = self.v - s
        return s


class Looped(nn.Module):
    """A recurrent layer; `kind` selects what a step reads beside its input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc, self.rec, self.fires = kind, nn.Linear(6, 4), nn.Linear(4, 4), Fires()
        self.gains = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(x)

    def fire(self, v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v + current
        s = spike(v - 1)
        return s, v - s

    def first_of_deque(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        delayed, out = deque([v] * 6, maxlen=6), []
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t) + self.rec(delayed[0]))
            delayed.append(s)
            out.append(s)
        return torch.stack(out)

    def popped(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        delayed, out = [v] * 6, []
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t) + self.rec(delayed.pop(0)))
            delayed.append(s)
            out.append(s)
        return torch.stack(out)

    def far_back(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = [v] * 6
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t) + self.rec(out[-6]))
            out.append(s)
        return torch.stack(out[6:])

    def rebuilt_list(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        history, out = [v] * 6, []
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t) + self.rec(history[0]))
            history = history[1:] + [s]
            out.append(s)
        return torch.stack(out)

    def chain(self, x: Tensor) -> Tensor:
        v = a = b = c = d = e = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = []
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t) + self.rec(e))
            e = d
            d = c
            c = b
            b = a
            a = s
            out.append(s)
        return torch.stack(out)

    def maximum_index(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            s, v = self.fire(v, self.fc(x[t]) + self.fc(x[max(t - 6, 0)]))
            out.append(s)
        return torch.stack(out)

    def shifted_index(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            s, v = self.fire(v, self.fc(x[t >> 3]))
            out.append(s)
        return torch.stack(out)

    def schedule(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for gain, x_t in zip(itertools.cycle([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0]), x, strict=False):
            s, v = self.fire(v, self.fc(x_t) * gain)
            out.append(s)
        return torch.stack(out)

    def table(self, x: Tensor) -> Tensor:
        v, out, changes = torch.zeros(x.shape[1], 4, dtype=x.dtype), [], {5: 4.0}
        for t, x_t in enumerate(x):
            s, v = self.fire(v, self.fc(x_t) * changes.get(t, 1.0))
            out.append(s)
        return torch.stack(out)

    def shorter_list(self, x: Tensor) -> Tensor:
        v, out, gains = torch.zeros(x.shape[1], 4, dtype=x.dtype), [], [1.0] * 5
        for t, x_t in enumerate(x):
            try:
                gain = gains[t]
            except IndexError:
                gain = 3.0
            s, v = self.fire(v, self.fc(x_t) * gain)
            out.append(s)
        return torch.stack(out)

    def counting_neuron(self, x: Tensor) -> Tensor:
        self.fires.v = None
        return torch.stack([self.fires(self.fc(x_t)) for x_t in x])

    def rounded_index(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            s, v = self.fire(v, self.fc(x[t]) * self.gains[int(t / 6)])
            out.append(s)
        return torch.stack(out)

    def length_of_list(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t))
            out.append(s)
            if len(out) > 5:
                v = 0.5 * v
        return torch.stack(out)

    def attribute(self, x: Tensor) -> Tensor:
        v, out, self.t = torch.zeros(x.shape[1], 4, dtype=x.dtype), [], 0
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t))
            out.append(s)
            self.t += 1
            if self.t > 6:
                v = 0.5 * v
        return torch.stack(out)

    def iterator(self, x: Tensor) -> Tensor:
        v, out, numbers = torch.zeros(x.shape[1], 4, dtype=x.dtype), [], itertools.count()
        for x_t in x:
            s, v = self.fire(v, self.fc(x_t))
            out.append(s)
            if next(numbers) == 5:
                v = torch.zeros_like(v)
        return torch.stack(out)

    def counting_while(self, x: Tensor) -> Tensor:
        v, out, t = torch.zeros(x.shape[1], 4, dtype=x.dtype), [], 0
        while t < x.shape[0]:
            s, v = self.fire(v, self.fc(x[t]) * (4.0 if t > 20 else 1.0))
            out.append(s)
            t += 1
        return torch.stack(out)


FIXED = (
    "first_of_deque popped far_back rebuilt_list chain shifted_index schedule table shorter_list rounded_index "
    "maximum_index counting_while"
).split()
REFUSED = "counting_neuron length_of_list attribute iterator".split()


@pytest.mark.parametrize("kind", FIXED)
def test_converts_for_the_length_of_the_example(kind: str) -> None:
    net = assert_converts_sequence(Looped(kind), (sequence(8, 3, 6),))
    for steps in (7, 12):
        with pytest.raises(InputError, match="SNNFX312"):
            net(sequence(steps, 3, 6))


@pytest.mark.parametrize("kind", REFUSED)
def test_other_code_in_a_later_iteration_is_refused_by_line(kind: str) -> None:
    with pytest.raises(CaptureError, match="SNNFX230") as caught:
        assert_converts_sequence(Looped(kind), (sequence(8, 3, 6),))
    assert "test_loops_that_depend_on_history.py" in caught.value.where
