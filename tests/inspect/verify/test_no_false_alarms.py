"""Right nets that `snnfx.verify` must pass, and faults that it must not excuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError, VerificationError


def test_constants_that_capture_rounded_to_float32_are_computed_anew_in_float64() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x + torch.exp(torch.linspace(0, 1, 4)) * 0.3

    model = Model()
    report = snnfx.verify(model, snnfx.convert(model), torch.rand(3, 2, 4), double=True)
    assert "computed anew in float64" in str(report)


def test_a_wrong_constant_is_no_rounding() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.linspace(0, 1, 4)

    model = Model()
    net = snnfx.convert(model)
    next(net.snnfx_constants.buffers()).mul_(1.001)
    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(model, net, torch.rand(3, 2, 4), double=True)


class TwoCalls(nn.Module):
    """One dropout layer that is called twice in a step; the net computes the second call first."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.lif = nn.Dropout(0.3), snnfx.neuron.LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif(x)
        return self.drop(y) + 2 * self.drop(x)


@pytest.mark.parametrize("double", [False, True])
def test_calls_of_one_dropout_layer_may_run_in_another_order(double: bool) -> None:
    model = TwoCalls()
    assert snnfx.verify(model, snnfx.convert(model), torch.rand(4, 2, 6), double=double).training


def test_many_places_that_draw_alike_pass_or_are_refused() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snnfx.neuron.LIFNode(v_threshold=0.3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lif(x)
            for k in range(5):
                y = F.dropout(y, 0.2) + k * F.dropout(x, 0.2)
            return y

    model = Many()
    try:
        snnfx.verify(model, snnfx.convert(model), torch.rand(4, 2, 6))
    except VerificationError as error:
        assert error.code == "SNNFX411"


class Plain(nn.Module):
    """A model with its state in a plain attribute."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.h = torch.full((3,), first)

    def forward(self, x: Tensor) -> Tensor:
        self.h = 0.5 * self.h + x
        return self.h * 1.0


def test_a_net_with_another_first_state_is_found() -> None:
    net = snnfx.convert(Plain(0.25), example_inputs=torch.rand(2, 3))
    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(Plain(0.0), net, torch.rand(4, 2, 3))


def test_the_net_of_a_stepped_model_starts_where_it_was_captured() -> None:
    model = Plain(0.25)
    net = snnfx.convert(model, example_inputs=torch.rand(2, 3))
    model(torch.rand(2, 3))
    assert snnfx.verify(model, net, torch.rand(4, 2, 3)).T == 4


def test_the_net_of_another_model_is_refused_by_name() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 3), snnfx.neuron.LIFNode()))
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"SNNFX413.*\n?.*`1` \(LIFNode\)"):
        snnfx.verify(other, net, torch.rand(4, 2, 3))
    assert snnfx.verify(net.source, net, torch.rand(4, 2, 3)).T == 4


def test_a_counter_that_the_net_does_not_keep_is_found() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    class Counting(Late):
        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return x * 2

    model, net = Counting(), snnfx.convert(Late())
    with pytest.raises(VerificationError, match="SNNFX410.*seen"):
        snnfx.verify(model, net, torch.rand(4, 2, 3))


class Delayed(snnfx.MemoryModule):
    """A model that keeps its state under a second name, which the next step reads."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.register_memory("h", 0.0)
        self.reads, self.last = reads, torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.h = 0.5 * self.h + x
        if not self.reads:
            return self.h * 1.0
        y = self.h + self.last
        self.last = self.h
        return y


def test_an_attribute_that_shares_the_tensor_of_a_state_is_compared() -> None:
    net = snnfx.convert(Delayed(False), example_inputs=torch.rand(2, 3))
    with pytest.raises(VerificationError, match="SNNFX410.*last"):
        snnfx.verify(Delayed(True), net, torch.rand(1, 2, 3))
