"""Bound calls run loops with products, single steps and separate first steps; results are those of unbound calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.lowering.mixed.executor import ScheduleRun
from snnfx.regions.bound_loop import FlatSteps
from snnfx.regions.eager_regions import EagerLoop
from snnfx.regions.region_kernels import BoundMixedLoop
from snnfx.regions.stepping_choice import LOOPS
from snnfx.runtime.execution import Execution
from snnfx.surrogate import ATan


class Recurrent(nn.Module):
    """Feeds spikes back through a layer; the states are plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rec, self.out, self.spike = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), ATan()
        self.reset()

    def reset(self) -> None:
        self.v: Any = None
        self.s: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros(x.shape[0], 5, dtype=x.dtype)
            self.s = torch.zeros_like(self.v)
        self.v = 0.5 * self.v + self.fc(x) + self.rec(self.s)
        self.s = self.spike(self.v - 0.3)
        self.v = self.v - 0.3 * self.s
        return self.out(self.s)


class FirstDiffers(nn.Module):
    """The first step calls no recurrent layer, so that it has a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rec = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.lif, self.out = neuron.LIFNode(v_threshold=0.2), nn.Linear(4, 3)
        self.s: Any = None

    def reset(self) -> None:
        self.s = None
        self.lif.reset()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.s is not None:
            h = h + self.rec(self.s)
        self.s = self.lif(h)
        return self.out(self.s.mean((2, 3)))


class StackedStates(nn.Module):
    """Layers with gains from parameters, whose states are stacked in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ff, self.rec = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.leak, self.gain = nn.Parameter(torch.randn(3, 1, 1)), nn.Parameter(torch.rand(3, 1, 1))
        self.spike = ATan()
        self.state: Any = None

    def reset(self) -> None:
        self.state = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.ff(3 * x)
        state = torch.zeros(2, *h.shape, dtype=h.dtype) if self.state is None else self.state
        v, z = state
        leak = torch.sigmoid(self.leak)
        v = v * leak * (1 - z.detach()) + (1 - leak) * (h + self.rec(z))
        z = self.spike(v - self.gain.clamp(min=0.01) * 0.1)
        self.state = torch.stack([v, z])
        return z


class Gated(nn.Module):
    """A convolutional gated unit; its input is joined with the state, in channels-last format."""

    def __init__(self) -> None:
        super().__init__()
        self.ff, self.rec, self.lif = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), neuron.LIFNode()
        self.new, self.spike = nn.Conv2d(8, 4, 3, padding=1), ATan()
        self.h: Any = None

    def reset(self) -> None:
        self.h = None
        self.lif.reset()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ff(x)
        if self.h is None:
            self.h = torch.zeros_like(x)
        reset, update = torch.sigmoid(self.rec(torch.cat([x, self.h], 1))).chunk(2, 1)
        new = self.spike(torch.tanh(self.new(torch.cat([x, self.h * reset], 1))))
        self.h = self.h * (1 - update) + new * update
        return self.h


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (Recurrent, (6,)),
    "first step differs": (FirstDiffers, (2, 4, 4)),
    "stacked states": (StackedStates, (2, 4, 4)),
    "gated": (Gated, (2, 4, 4)),
}


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_MEASURE", "0")


@pytest.fixture
def stepped_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every measurement finds that steps are faster."""
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SNNFX_MEASURE", "1")
    monkeypatch.setattr(LOOPS, "measure", lambda fixed, functions: "steps")
    LOOPS.remembered.forget()
    yield
    LOOPS.remembered.forget()


def made(name: str) -> tuple[nn.Module, Any, tuple[int, ...]]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    torch.manual_seed(0)
    net = snnfx.convert(make().double(), example_inputs=torch.rand(2, *shape).double())
    return model, net, shape


def sequence(T: int, N: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(T, N, *shape, generator=generator, dtype=torch.float64)


def stepped(model: Any, x_seq: Tensor) -> Tensor:
    model.reset()
    y_seq = torch.stack([model(x) for x in x_seq])
    model.reset()
    return y_seq


def results(run: Callable[[Tensor], Tensor], module: nn.Module, x_seq: Tensor) -> list[Tensor | None]:
    x_seq = x_seq.clone().requires_grad_()
    module.zero_grad()
    y = run(x_seq)
    (y * torch.linspace(0.1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x_seq.grad, *(None if p.grad is None else p.grad.clone() for p in module.parameters())]


def assert_equals_stepping(net: Any, model: Any, x_seq: Tensor) -> None:
    for ours, theirs in zip(results(net, net, x_seq), results(lambda x: stepped(model, x), model, x_seq), strict=True):
        torch.testing.assert_close(
            torch.zeros(1).double() if ours is None else ours,
            torch.zeros(1).double() if theirs is None else theirs,
            rtol=1e-9,
            atol=1e-11,
        )
    with torch.no_grad():
        torch.testing.assert_close(net(x_seq), stepped(model, x_seq), rtol=1e-9, atol=1e-11)


def count(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """A list that grows with each call of a method."""
    calls: list[int] = []
    method = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("N", [1, 3])
def test_bound_loops_equal_stepping_and_unbound_calls(name: str, T: int, N: int) -> None:
    model, net, shape = made(name)
    x_seq = sequence(T, N, shape)
    unbound = results(net, net, x_seq)
    for seed in range(4):
        assert_equals_stepping(net, model, sequence(T, N, shape, seed))
    for ours, theirs in zip(results(net, net, x_seq), unbound, strict=True):
        assert ours is theirs or (ours is not None and theirs is not None and torch.equal(ours, theirs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_flat_steps_equal_stepping(name: str, T: int, stepped_choice: None) -> None:
    model, net, shape = made(name)
    for seed in range(4):
        assert_equals_stepping(net, model, sequence(T, 2, shape, seed))


@pytest.mark.parametrize("name", MODELS)
def test_a_bound_call_runs_bound_loops_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net, shape = made(name)
    x_seq = sequence(4, 2, shape)
    for _ in range(3):
        net(x_seq)
    unbound, whole = count(monkeypatch, EagerLoop, "loop_eagerly"), count(monkeypatch, Execution, "run_sequence")
    bound = count(monkeypatch, BoundMixedLoop, "run")
    net(x_seq)
    assert not unbound and not whole and bound


@pytest.mark.parametrize("name", MODELS)
def test_a_repeated_training_step_builds_no_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net, shape = made(name)
    for seed in range(3):
        results(net, net, sequence(4, 2, shape, seed))
    built = count(monkeypatch, ScheduleRun, "__init__")
    results(net, net, sequence(4, 2, shape))
    assert not built


@pytest.mark.parametrize("name", MODELS)
def test_steps_that_are_faster_run_flat(name: str, monkeypatch: pytest.MonkeyPatch, stepped_choice: None) -> None:
    _, net, shape = made(name)
    x_seq = sequence(4, 2, shape)
    for _ in range(3):
        net(x_seq)
    checked, flat = count(monkeypatch, EagerLoop, "_step_by_step"), count(monkeypatch, FlatSteps, "run")
    net(x_seq)
    assert not checked and flat
    assert "measured to be faster" in str(snnfx.explain(net))


@pytest.mark.parametrize("name", MODELS)
def test_settings_parameters_and_hooks_may_change_between_calls(name: str) -> None:
    model, net, shape = made(name)
    x_seq = sequence(3, 2, shape)
    for _ in range(3):
        assert_equals_stepping(net, model, x_seq)
    for module in (model, net):
        module.rec.weight.requires_grad_(False)  # type: ignore[union-attr]
    assert_equals_stepping(net, model, x_seq)
    for module in (model, net):
        module.rec.weight = nn.Parameter(0.5 * module.rec.weight.detach())  # type: ignore[union-attr, operator]
    assert_equals_stepping(net, model, x_seq)
    for module in (model, net):
        if name == "first step differs":
            module.lif.v_threshold = 0.05  # type: ignore[union-attr]
        else:
            module.spike.alpha = 3.0  # type: ignore[union-attr]
    assert_equals_stepping(net, model, x_seq)
    called: list[int] = []
    net.rec.register_forward_hook(lambda *_: called.append(1))
    assert_equals_stepping(net, model, x_seq)
    assert called


def test_hooks_of_layers_of_the_first_step_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _, net, shape = made("first step differs")
    x_seq = sequence(3, 2, shape)
    for _ in range(3):
        net(x_seq)
    called: list[int] = []
    net.conv.register_forward_hook(lambda *_: called.append(1))
    net(x_seq)
    assert len(called) == 2  # the first step, then all others at once


def test_flat_steps_run_hooks_that_are_added_later(stepped_choice: None) -> None:
    _, net, shape = made("linear")
    x_seq = sequence(3, 2, shape)
    for _ in range(3):
        net(x_seq)
    called: list[int] = []
    net.spike.register_forward_hook(lambda *_: called.append(1))
    net(x_seq)
    assert len(called) == 3


def test_calls_with_state_follow_bound_calls() -> None:
    model, net, shape = made("first step differs")
    x_seq = sequence(5, 2, shape)
    for _ in range(3):
        net(x_seq)
    first, state = net.run(x_seq[:2])
    second, _ = net.run(x_seq[2:], state=state)
    torch.testing.assert_close(torch.cat([first, second]), stepped(model, x_seq), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(net(x_seq), stepped(model, x_seq), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reduce", ["mean", "sum", "last"])
def test_a_separate_first_step_counts_in_reductions(reduce: str) -> None:
    torch.manual_seed(0)
    model = FirstDiffers().double()
    x_seq = sequence(4, 2, (2, 4, 4))
    net = snnfx.convert(model, example_inputs=x_seq[0], reduce=reduce)
    expected = stepped(model, x_seq)
    expected = expected[-1] if reduce == "last" else getattr(expected, reduce)(0)
    for _ in range(4):
        torch.testing.assert_close(net(x_seq), expected, rtol=1e-9, atol=1e-11)
    assert net._bound_calls._bound.is_filled


@pytest.mark.parametrize("name", MODELS)
def test_several_threads_share_a_bound_net(name: str) -> None:
    model, net, shape = made(name)
    sequences = [sequence(4, 2, shape, seed) for seed in range(4)]
    expected = [stepped(model, x).detach() for x in sequences]
    for _ in range(3):
        net(sequences[0])
    faults: list[str] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.allclose(net(sequences[i]), expected[i], rtol=1e-9, atol=1e-11):
                faults.append(f"sequence {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
