"""Kept runs of compiled loops read given tensors and write results where they are: equal to stepping, nothing kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.mixed import bound_runs
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.region_modules import LoopRegion
from snnfx.surrogate import ATan
from support.stepping import assert_same

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")

CALLS = 4
"""The first builds nothing, the second builds a run, and the others repeat it."""


class Layer(nn.Module):
    """A layer without a linear layer in front, so that its loop reads the given tensor itself."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.back, self.spike = nn.Linear(hidden, hidden), ATan()
        self.v: Tensor | float = 0.0
        self.z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x) if self.z is None else self.z
        self.v = 0.5 * self.v + x + self.back(z)
        self.z = self.spike(self.v - 1.0)
        return self.z


class Joined(nn.Module):
    """A layer that keeps both states in one tensor, and returns more than one sequence."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.back, self.spike = nn.Linear(hidden, hidden), ATan()
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, z = torch.zeros(2, *x.shape, dtype=x.dtype) if self.state is None else self.state
        v = 0.5 * v + x + self.back(z)
        z = self.spike(v - 1.0)
        self.state = torch.stack([v, z])
        return z, v, x


def stepped(model: nn.Module, x_seq: Tensor) -> tuple[Tensor, ...]:
    model = copy.copy(model)  # shares the parameters; the state is its own
    steps = [model(x) for x in x_seq]
    columns = zip(*[step if isinstance(step, tuple) else (step,) for step in steps], strict=True)
    return tuple(torch.stack(column) for column in columns)


def run(net: snnfx.Net, x_seq: Tensor) -> tuple[Tensor, ...]:
    y = net(x_seq)
    return y if isinstance(y, tuple) else (y,)


def kept_runs(net: snnfx.Net) -> list[bound_runs.BoundRun]:
    regions = [region for region in net.region_modules().values() if isinstance(region, LoopRegion)]
    steps = [r.kernels.in_use for r in regions if r.kernels is not None and isinstance(r.kernels.in_use, MixedStep)]
    schedules = [schedule for step in steps for schedule in step._schedules()]
    return [kept for schedule in schedules for kept in schedule.kept_runs.values() if kept is not None]


@pytest.fixture(autouse=True)
def small_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_runs, "_LEAST_MOVED_BYTES", 0)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("make", [Layer, Joined])
@pytest.mark.parametrize(("hidden", "batch"), [(256, 16), (70, 3), (37, 1), (48, 17)])
@pytest.mark.usefixtures("threads")
def test_repeated_calls_equal_stepping(make: Callable[[int], nn.Module], hidden: int, batch: int) -> None:
    torch.manual_seed(0)
    model = make(hidden).double()
    net = snnfx.convert(model, example_inputs=torch.rand(batch, hidden, dtype=torch.float64))
    parameters = list(model.parameters())
    for _ in range(CALLS):
        x_seq = torch.randn(20, batch, hidden, dtype=torch.float64).requires_grad_()
        with torch.no_grad():
            assert_same(run(net, x_seq), stepped(model, x_seq))
        found, wanted = run(net, x_seq), stepped(model, x_seq)
        assert_same(found, wanted)
        weights = [torch.randn_like(y) for y in wanted]
        grads = (
            torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), (x_seq, *parameters))
            for ys in (found, wanted)
        )
        assert_same(*grads)
    kept = kept_runs(net)
    assert len(kept) == 3
    assert all(bound.relocation is not None for bound in kept)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "as given": lambda x: x,
    "every second step": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second neuron": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "batch before time": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "an offset": lambda x: torch.cat((x.new_zeros(1, *x.shape[1:]), x))[1:],
    "one sample for all": lambda x: x[:, :1].expand(x.shape),
    "overlapping windows": lambda x: torch.randn(3, 41, dtype=x.dtype).unfold(1, 33, 1).transpose(0, 1),
    "negated": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("name", STRIDED)
def test_inputs_of_any_layout_at_any_address(name: str) -> None:
    model = Layer(33).double()
    net = snnfx.convert(model, example_inputs=torch.rand(3, 33, dtype=torch.float64))
    alive = []
    for k in range(3 * CALLS):
        x_seq = STRIDED[name if k % 3 else "as given"](torch.randn(9, 3, 33, dtype=torch.float64))
        alive.append(x_seq)  # so that each input has another address
        assert_same(run(net, x_seq), stepped(model, x_seq))


def test_a_kept_run_keeps_neither_inputs_nor_results_alive() -> None:
    net = snnfx.convert(Layer(64), example_inputs=torch.rand(4, 64))
    for _ in range(2 * CALLS):
        x_seq = torch.randn(20, 4, 64).requires_grad_()
        y_seq = net(x_seq)
        y_seq.sum().backward()
        references = weakref.ref(x_seq), weakref.ref(y_seq)
        del x_seq, y_seq
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert all(not bound.relocation._moved for bound in kept_runs(net) if bound.relocation is not None)


def test_no_call_keeps_its_input_alive() -> None:
    net = snnfx.convert(Layer(64), example_inputs=torch.rand(4, 64))
    references = []
    for _ in range(2 * CALLS):  # one of them binds the loop to the layout of its input
        x_seq = torch.randn(20, 4, 64)
        net(x_seq).sum().backward()
        references.append(weakref.ref(x_seq))
        del x_seq
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_results_do_not_change_in_later_calls() -> None:
    model = Joined(40).double()
    net = snnfx.convert(model, example_inputs=torch.rand(5, 40, dtype=torch.float64))
    x_seqs = [torch.randn(12, 5, 40, dtype=torch.float64) for _ in range(CALLS)]
    results = [net.run(x_seq) for x_seq in x_seqs]
    for x_seq, (y_seq, state) in zip(x_seqs, results, strict=True):
        assert_same(y_seq, stepped(model, x_seq))
        assert_same(list(state.values()), list(net.run(x_seq)[1].values()))


@pytest.mark.parametrize("T", [20, 3000])  # the pool of buffers allocates the larger result
def test_results_may_be_changed_in_place(T: int) -> None:
    net = snnfx.convert(Layer(32), example_inputs=torch.rand(4, 32))
    x_seq = torch.randn(T, 4, 32)
    grads = []
    for k in range(CALLS):
        net.zero_grad()
        y_seq = net(x_seq)
        y_seq = y_seq * 2 if k == 0 else y_seq.mul_(2)
        y_seq.sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for later in grads[1:] for a, b in zip(grads[0], later, strict=True))


def test_large_runs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_runs, "_MOST_BYTES_OF_LOOP", 0)
    net = snnfx.convert(Layer(16), example_inputs=torch.rand(2, 16))
    with torch.no_grad():
        for _ in range(CALLS):
            net(torch.randn(5, 2, 16))
    assert not kept_runs(net)


def test_no_memory_is_allocated_for_the_gaps_of_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_runs, "_MOST_BYTES_OF_LOOP", 1 << 20)
    model = Layer(16).double()
    net = snnfx.convert(model, example_inputs=torch.rand(2, 16, dtype=torch.float64))
    with torch.no_grad():
        for _ in range(CALLS):
            x_seq = torch.randn(5, 2, 1 << 18, dtype=torch.float64)[:, :, :: 1 << 14]
            assert_same(run(net, x_seq), stepped(model, x_seq))
    assert not kept_runs(net)
