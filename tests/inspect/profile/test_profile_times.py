"""Times of regions in `snnfx.profile`, and the state of the model after a profile."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from snnfx.inspect.profile.region_times import median_times
from support.nets import CSNN, BatchCoupled, Recurrent, TwoInputs

T, N = 5, 3


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(0.03)
        return g * 2


class SlowLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Slow.apply(x)  # type: ignore[no-any-return]


def test_every_region_has_a_row_and_says_how_it_runs() -> None:
    net = snnfx.convert(BatchCoupled())
    report = snnfx.profile(net, torch.rand(T, N, 5), repeats=1)
    assert [row.region for row in report.regions] == [*(r.name for r in net.regions), ""]
    assert {row.kind for row in report.regions} >= {"fold", "map", "loop"}
    assert all(row.forward > 0 for row in report.regions if row.region)
    assert all(row.runs_as for row in report.regions if row.region)


def test_times_belong_to_the_slow_region() -> None:
    model = nn.Sequential(nn.Linear(3, 3), snnfx.neuron.LIFNode(), SlowLayer(), nn.Linear(3, 3))
    report = snnfx.profile(snnfx.convert(model), torch.rand(T, N, 3), train=True, repeats=3)
    slow = max(report.regions, key=lambda row: row.backward)
    assert any("Slow" in text or "2" in text for text in slow.contents)
    assert slow.forward >= 10 and slow.backward >= 30
    assert report.forward >= 10 and report.backward >= 25


def test_stepped_and_kernel_loops_are_told_apart() -> None:
    x_seq = torch.rand(T, N, 5)
    model = nn.Sequential(nn.Linear(5, 4), snnfx.neuron.LIFNode())
    stepped = snnfx.profile(snnfx.convert(model, lower=None), x_seq, repeats=1)
    assert [row.runs_as for row in stepped.regions if row.kind == "loop"] == ["stepped"]


def test_inference_has_no_backward_time() -> None:
    report = snnfx.profile(snnfx.convert(Recurrent()), torch.rand(T, N, 6), repeats=1)
    assert report.backward == 0 and all(row.backward == 0 for row in report.regions)


@pytest.mark.parametrize("train", [False, True])
def test_a_profile_changes_nothing(train: bool) -> None:
    torch.manual_seed(0)
    model = CSNN().train(not train)
    net = snnfx.convert(model, carry_state=True)
    x_seq = torch.rand(T, N, 1, 8, 8)
    net(x_seq)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in net.carried_state.items()}
    flags, rng = [m.training for m in net.modules()], torch.get_rng_state()
    keys = [name for name, _ in net.named_modules()]
    snnfx.profile(net, x_seq, train=train, repeats=1, record=["lif1"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in net.carried_state.items())
    assert [m.training for m in net.modules()] == flags and torch.equal(torch.get_rng_state(), rng)
    assert [name for name, _ in net.named_modules()] == keys


def test_several_inputs_and_names() -> None:
    net = snnfx.convert(TwoInputs())
    report = snnfx.profile(net, torch.rand(T, N, 4), torch.rand(T, N, 3), train=True, repeats=1)
    assert report.inputs == ((T, N, 4), (T, N, 3)) and (report.T, report.batch) == (T, N)


def test_a_peeled_first_step_is_measured_and_noted() -> None:
    class Peeled(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_memory("v", None)

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.fc(x) * 3 if self.v is None else 0.5 * self.v + self.fc(x)
            return torch.tanh(self.v)

    net = snnfx.convert(Peeled())
    report = snnfx.profile(net, torch.rand(T, N, 3), train=True, repeats=1)
    assert report.forward > 0
    if net.program.first_step is not None:
        assert any("first step" in note for note in report.notes)


def test_the_advice_names_an_input_that_does_not_change() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 4), snnfx.neuron.LIFNode()))
    constant = snnfx.profile(net, torch.rand(1, N, 3).expand(T, N, 3), repeats=1)
    assert "time_dim=None" in [a.option for a in constant.advice]
    varying = snnfx.profile(net, torch.rand(T, N, 3), repeats=1)
    assert "time_dim=None" not in [a.option for a in varying.advice]


def test_the_advice_to_lower_is_for_stepped_loops_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), snnfx.neuron.LIFNode())
    x_seq = torch.rand(T, N, 3)
    stepped = snnfx.profile(snnfx.convert(model, lower=None), x_seq, repeats=1)
    assert 'lower="auto"' in [a.option for a in stepped.advice]
    assert 'lower="auto"' not in [a.option for a in snnfx.profile(snnfx.convert(model), x_seq, repeats=1).advice]


def test_a_model_that_is_no_net_is_refused() -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.profile(nn.Linear(3, 3), torch.rand(T, N, 3))
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.profile(snnfx.convert(nn.Linear(3, 3)), torch.rand(T, N, 3), repeats=0)


def test_noise_of_the_forward_pass_does_not_change_the_time_of_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, forward_times = [0.0], iter([50.0, 9.0, 1.0, 30.0])
    monkeypatch.setattr("snnfx.inspect.profile.region_times.time.perf_counter", lambda: clock[0])

    def forward() -> str:
        clock[0] += next(forward_times)
        return "outputs"

    def backward(outputs: str) -> None:
        assert outputs == "outputs"
        clock[0] += 2.0

    assert median_times(forward, backward, torch.device("cpu"), warm_up=1, repeats=3) == (9.0, 2.0)
