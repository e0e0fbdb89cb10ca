"""Loops whose last iteration differs: a readout at the end, no reset, another update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from support.looped_models import Cell, assert_converts_sequence, spike
from support.stepping import assert_same


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Looped(nn.Module):
    """A recurrent layer; `kind` selects what the last step does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.fc, self.out, self.T = kind, nn.Linear(6, 4), nn.Linear(4, 3), 6
        self.cell, self.norm, self.late = Cell(), nn.BatchNorm1d(4), 4

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(x)

    def readout_of_spikes(self, x: Tensor) -> Tensor:
        v, T = None, x.shape[0]
        for t in range(T):
            s, v = self.cell(self.fc(x[t]), v)
            if t == T - 1:
                y = self.out(self.norm(s))
        return y

    def returns_inside(self, x: Tensor) -> Tensor:
        v = None
        for t in range(x.size(0)):
            _, v = self.cell(self.fc(x[t]), v)
            if t + 1 == x.shape[0]:
                return self.out(v)
        raise AssertionError

    def no_reset(self, x: Tensor) -> Tensor:
        T, batch, _ = x.shape
        v = torch.zeros(batch, 4, dtype=x.dtype)
        for t in range(T):
            v = 0.8 * v + self.fc(x[t])
            s = spike(v - 1)
            if t < T - 1:
                v = v - s
        return self.out(v)

    def no_reset_in_list(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t, x_t in enumerate(x):
            v = 0.8 * v + self.fc(x_t)
            s = spike(v - 1)
            if t != len(x) - 1:
                v = v - s
            out.append(v)
        return torch.stack(out)

    def other_update(self, x: Tensor) -> Tensor:
        v, out, T = torch.zeros(x.shape[1], 4, dtype=x.dtype), [], len(x)
        for t in range(T):
            v = v + 0.5 * self.fc(x[t]) if t == T - 1 else 0.8 * v + self.fc(x[t])
            s = spike(v - 1)
            v = v - s
            out.append(s)
        return torch.stack(out)

    def first_and_last(self, x: Tensor) -> Tensor:
        out, T = [], x.shape[0]
        for t in range(T):
            v = 0.3 * self.fc(x[t]) if t == 0 else 0.8 * v + self.fc(x[t])  # noqa: F821
            s = spike(v - 1)
            if t < T - 1:
                v = v * (1 - s)
            out.append(s + v)
        return torch.stack(out)

    def at_an_attribute(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            v = 0.8 * v + self.fc(x[t])
            s = spike(v - 1)
            if t < self.late - 1:
                v = v - s
            out.append(s)
        return torch.stack(out)

    def static_input(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(self.T):
            v = 0.8 * v + self.fc(x[0])
            s = spike(v - 1)
            v = v - s
            if t == self.T - 1:
                return self.out(s)
        raise AssertionError

    def before_the_last(self, x: Tensor) -> Tensor:
        v, T, y = None, x.shape[0], x.new_zeros(x.shape[1], 3)
        for t in range(T):
            s, v = self.cell(self.fc(x[t]), v)
            if t == T - 2:
                y = self.out(s)
        return y + self.out(v)

    def at_the_third(self, x: Tensor) -> Tensor:
        v, y = None, x.new_zeros(x.shape[1], 3)
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            if t == 2:
                y = self.out(s)
        return y + self.out(v)

    def every_second(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            if t % 2 == 1:
                out.append(self.out(s))
        return torch.stack(out)


ANY_LENGTH = "readout_of_spikes returns_inside no_reset no_reset_in_list other_update".split()
FIXED = "first_and_last static_input before_the_last at_the_third every_second".split()


@pytest.mark.parametrize("kind", ANY_LENGTH)
def test_equal_to_the_own_call_for_any_length(kind: str) -> None:
    others = [(sequence(9, 2, 6),), (sequence(2, 2, 6),)]
    if kind != "other_update":
        others.append((sequence(1, 2, 6),))
    net = assert_converts_sequence(Looped(kind), (sequence(6, 3, 6),), others)
    steps = net.loops or [net]
    assert any(region.kind == "loop" for loop in steps for region in loop.regions)


@pytest.mark.parametrize("kind", FIXED)
def test_equal_to_the_own_call_at_the_length_of_the_example(kind: str) -> None:
    net = assert_converts_sequence(Looped(kind), (sequence(6, 3, 6),), [(sequence(6, 2, 6),)])
    assert any(region.kind == "loop" for loop in net.loops for region in loop.regions)
    if kind != "static_input":
        with pytest.raises(InputError, match="SNNFX312"):
            net(sequence(1, 3, 6))


def test_a_test_for_another_number_keeps_the_length_of_the_example() -> None:
    with pytest.raises(Exception, match="SNNFX230"):
        snnfx.convert(Looped("at_an_attribute").double(), takes="sequence", example_inputs=(sequence(9, 3, 6),))
    net = assert_converts_sequence(Looped("at_an_attribute"), (sequence(4, 3, 6),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(9, 3, 6))


@pytest.mark.parametrize("kind", ["returns_inside", "no_reset"])
def test_streams_return_the_readout_of_all_steps_so_far(kind: str) -> None:
    model, x = Looped(kind).double().eval(), sequence(6, 3, 6)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    assert net.options.reduce == "last"
    parts = list(net.stream(x.split(2)))
    for end, part in zip((2, 4, 6), parts, strict=True):
        assert_same(part, model(x[:end]))


class MeanAndReadout(nn.Module):
    """One output that combines two reductions over time: a mean, and the readout of the last iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.readout = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        v, values = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            v = v * 0.5 + self.fc(x[t])
            values.append(v)
            if t == x.shape[0] - 1:
                y = self.readout(v)
        return y + torch.stack(values).mean(0)


def test_one_output_may_combine_two_reductions_over_time() -> None:
    model = MeanAndReadout().double()
    net = snnfx.convert(model, takes="sequence", example_inputs=(torch.randn(4, 3, 4, dtype=torch.float64),))
    for T in (4, 2, 1, 5):
        x_seq = torch.randn(T, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(net(x_seq), model(x_seq))
