"""Python branches that capture decides: on numbers that count the steps, and on parameters and buffers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError, SnnfxWarning
from support.stepping import assert_converts, step_model

T, N, C = 6, 3, 5


def x_seq() -> Tensor:
    return torch.rand(T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Counts(nn.Module):
    """Halves its potential in the steps that `branch` selects by their number."""

    def __init__(self, branch: Callable[[Any], Any], update: Callable[[Any], Any] = lambda t: t + 1) -> None:
        super().__init__()
        self.branch, self.update, self.t = branch, update, 0
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.t = self.update(self.t)
        v = x if self.v is None else 0.8 * self.v + x
        self.v = v * 0.5 if self.branch(self.t) else v
        return self.v


SETTLED: dict[str, Callable[[Any], Any]] = {
    "first": lambda t: t == 1,
    "not first": lambda t: t != 1,
    "later": lambda t: t > 1,
    "reversed": lambda t: t > 1,
    "never": lambda t: t < 0,
    "any": lambda t: t,
    "offset": lambda t: t - 1,
    "between integers": lambda t: t == 2.5,
}


@pytest.mark.parametrize("name", SETTLED)
def test_a_branch_that_all_later_steps_share_is_captured(name: str) -> None:
    assert_converts(Counts(SETTLED[name]).double(), x_seq())


OPEN: dict[str, Callable[[Any], Any]] = {
    "every second": lambda t: t % 2 == 0,
    "the third": lambda t: t == 3,
    "up to the third": lambda t: t <= 3,
    "far away": lambda t: t > 10_000,
}


@pytest.mark.parametrize("name", OPEN)
def test_a_branch_that_later_steps_change_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="SNNFX250.*`t` counts the steps"):
        snnfx.convert(Counts(OPEN[name]), example_inputs=x_seq()[0])


def test_a_number_that_recurs_is_followed_through_all_its_values() -> None:
    assert_converts(Counts(lambda t: t < 3, lambda t: (t + 1) % 3).double(), x_seq())
    with pytest.raises(CaptureError, match="SNNFX250"):
        snnfx.convert(Counts(lambda t: t < 2, lambda t: (t + 1) % 3), example_inputs=x_seq()[0])


def test_the_hint_of_a_refused_branch_leads_to_a_net() -> None:
    class Alternates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.t = (torch.zeros_like(x) if self.t is None else self.t) + 1
            return torch.where(self.t % 2 == 0, x * 0.5, x)

    net = assert_converts(Alternates(), x_seq())
    assert snnfx.explain(net).kernels[0].startswith("One kernel")


class Compares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(0.7))
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        leak = self.leak if self.leak > 0 else self.leak * 0.1
        self.v = x if self.v is None else leak * self.v + x
        return self.v


def test_a_parameter_may_change_while_its_branch_stays() -> None:
    model = Compares().double()
    net = snnfx.convert(model, example_inputs=x_seq()[0])
    with torch.no_grad():
        model.leak.fill_(0.3)
    torch.testing.assert_close(net(x_seq()), step_model(copy.deepcopy(model), x_seq()))


@pytest.mark.parametrize("other", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_parameter_that_takes_the_other_branch_plans_again(other: Any) -> None:
    net = other(snnfx.convert(Compares().double(), example_inputs=x_seq()[0]))
    with torch.no_grad():
        net.leak.fill_(-0.3)
    with pytest.warns(SnnfxWarning, match=r"SNNFX315 `leak > 0` is False, but the step was captured with True"):
        y_seq = net(x_seq())
    model = Compares().double()
    model.load_state_dict(net.state_dict())
    torch.testing.assert_close(y_seq, step_model(model, x_seq()))


def test_the_value_of_an_input_still_decides_nothing() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x if (x.sum() * self.w) > 0 else -x

    net = snnfx.convert(Decides(), example_inputs=x_seq()[0])
    assert [region.kind for region in net.regions] == ["loop"]


slope = nn.LeakyReLU(0.1)


class UsesLayersOfOthers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = nn.Sequential(nn.ConstantPad1d((1, 1), 0.5), nn.Hardtanh())(slope(x - 0.5))
        return F.relu(x) + 0.1 * x


def test_a_layer_without_parameters_may_be_made_in_forward() -> None:
    assert_converts(UsesLayersOfOthers().double(), x_seq())


def test_a_changed_setting_of_a_layer_outside_the_model_plans_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = snnfx.convert(UsesLayersOfOthers().double(), example_inputs=x_seq()[0])
    net(x_seq())
    monkeypatch.setattr(slope, "negative_slope", 0.9)
    with pytest.warns(SnnfxWarning, match="SNNFX315"):
        y_seq = net(x_seq())
    torch.testing.assert_close(y_seq, step_model(UsesLayersOfOthers(), x_seq()))
