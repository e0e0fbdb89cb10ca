"""Sums, means and last values behind a loop are reductions of the step form; fixed loops behind it become loops too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from support.looped_models import Cell, assert_converts_sequence
from support.stepping import assert_same


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Looped(nn.Module):
    """A layer over time; `kind` selects what the call returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.T, self.cell, self.cell2 = kind, 6, Cell(), Cell()
        self.fc, self.rec, self.out = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return getattr(self, self.kind)(x)  # type: ignore[no-any-return]

    def mean_of_total(self, x: Tensor) -> Tensor:
        v, total = None, 0
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            total = total + self.out(s)
        return total / x.shape[0]

    def mean_along_dimension_1(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        v, total = None, 0.0
        for t in range(x.shape[1]):
            s, v = self.cell(self.fc(x[:, t]), v)
            total += self.out(s)
        return total / x.size(1)  # type: ignore[return-value]

    def mean_of_filled_tensor(self, x: Tensor) -> Tensor:
        T, batch, _ = x.shape
        v, total = None, torch.zeros(batch, 4, dtype=x.dtype)
        for t in range(T):
            s, v = self.cell(self.fc(x[t]), v)
            total += s
        return self.out(total / T)

    def two_means(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v, spikes, scores = None, 0, 0
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
            spikes, scores = spikes + s, scores + self.out(s)
        return spikes / len(x), scores / len(x)  # type: ignore[return-value]

    def mean_of_list(self, x: Tensor) -> Tensor:
        v, out = None, []
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
            out.append(self.out(s))
        return torch.stack(out).sum(0) / x.shape[0]

    def total(self, x: Tensor) -> Tensor:
        v, total = None, 0
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
            total = total + self.out(s)
        return total

    def total_over_attribute(self, x: Tensor) -> Tensor:
        v, total = None, 0
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
            total = total + self.out(s)
        return total / self.T

    def last_potential(self, x: Tensor) -> Tensor:
        v = None
        for x_t in x:
            _, v = self.cell(self.fc(x_t), v)
        return v  # type: ignore[return-value]

    def readout_of_last_spikes(self, x: Tensor) -> Tensor:
        v = None
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
        return self.out(s)

    def fixed_iterations(self, x: Tensor) -> Tensor:
        v = None
        for t in range(self.T):
            _, v = self.cell(self.fc(x[t]), v)
        return v  # type: ignore[return-value]

    def softmax_of_mean(self, x: Tensor) -> Tensor:
        return self.mean_of_total(x).softmax(-1)

    def fixed_loop_behind(self, x: Tensor) -> Tensor:
        v, w, out = None, None, []
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
            out.append(s)
        code = torch.stack(out).softmax(0).mean(0)
        decoded = []
        for _ in range(5):
            s, w = self.cell2(self.rec(code), w)
            decoded.append(s)
        return torch.stack(decoded)

    def fixed_loop_inside(self, x: Tensor) -> Tensor:
        v, out = None, []
        for x_t in x:
            w = v
            for _ in range(3):
                s, w = self.cell(self.fc(x_t), w)
            v = w
            out.append(s)
        return torch.stack(out)


REDUCED = {
    "mean_of_total": "mean",
    "mean_along_dimension_1": "mean",
    "mean_of_filled_tensor": "mean",
    "two_means": "mean",
    "mean_of_list": "mean",
    "total": "sum",
    "total_over_attribute": "sum",
    "last_potential": "last",
    "readout_of_last_spikes": "last",
}


@pytest.mark.parametrize("kind", REDUCED)
def test_equal_to_the_own_call(kind: str) -> None:
    others = [(sequence(9, 2, 6),), (sequence(1, 2, 6),)]
    net = assert_converts_sequence(Looped(kind), (sequence(6, 3, 6),), others)
    assert net.options.reduce == REDUCED[kind]


@pytest.mark.parametrize("kind", [k for k in REDUCED if k != "mean_along_dimension_1"])
def test_streams_and_runs_return_the_value_of_all_steps_so_far(kind: str) -> None:
    model, x = Looped(kind).double().eval(), sequence(6, 3, 6)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,), chunk=2)
    with torch.no_grad():
        parts = list(net.stream(x.split(1)))
        assert_same(parts[3], model(x[:4]))
        assert_same(parts[-1], model(x))
        assert_same(net(x), model(x))
    assert_same(net.run(x)[0], model(x))


def test_the_step_of_a_mean_returns_the_value_of_the_step() -> None:
    model, x = Looped("mean_of_total").double().eval(), sequence(6, 3, 6)
    step = snnfx.convert(model, takes="sequence", example_inputs=(x,), step_mode="s")
    with torch.no_grad():
        values = [step(x_t) for x_t in x]
        assert_same(torch.stack(values).mean(0), model(x))


@pytest.mark.parametrize(
    ("kind", "reason"), [("fixed_iterations", r"range\(x\.shape\[0\]\)"), ("softmax_of_mean", "not affine")]
)
def test_calls_without_a_step_are_refused_by_line(kind: str, reason: str) -> None:
    net = assert_converts_sequence(Looped(kind), (sequence(6, 3, 6),))
    with pytest.raises(InputError, match=reason) as caught:
        net.stream(sequence(6, 3, 6).split(1))
    assert caught.value.code == "SNNFX235" and "test_values_behind_loops.py" in caught.value.where


def test_a_loop_of_fixed_length_becomes_a_loop_in_a_call_of_any_length() -> None:
    net = assert_converts_sequence(Looped("fixed_loop_behind"), (sequence(6, 3, 6),), [(sequence(9, 2, 6),)])
    assert [region.kind for loop in net.loops for region in loop.regions].count("loop") == 2


def test_a_loop_of_fixed_length_in_each_step() -> None:
    others = [(sequence(9, 2, 6),), (sequence(2, 2, 6),)]
    assert_converts_sequence(Looped("fixed_loop_inside"), (sequence(6, 3, 6),), others)
