"""Runs of mixed loops that are kept and repeated: equal to stepping, and never shared."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.lowering.mixed import bound_runs
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.region_modules import LoopRegion
from snnfx.surrogate import ATan
from support.stepping import assert_same

CALLS = 4
"""The first builds nothing, the second builds a run, and the others repeat it."""


class Recurrent(nn.Module):
    """A layer whose spikes return through a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.back = nn.Linear(5, 7), nn.Linear(7, 7)
        self.decay, self.spike = nn.Parameter(torch.rand(7)), ATan()
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.input(x)
        if self.state is None:
            self.state = torch.zeros(2, *current.shape, dtype=current.dtype)
        v, z = self.state
        v = v * self.decay.sigmoid() * (1 - z.detach()) + current + self.back(z)
        z = self.spike(v - 0.3)
        self.state = torch.stack([v, z])
        return z + 0.1 * v


class Convolutional(nn.Module):
    """A recurrent convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.back = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.spike = ATan()
        self.z: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        current = self.input(x)
        z = torch.zeros_like(current) if isinstance(self.z, float) else self.z
        self.v = 0.5 * self.v + current + self.back(z)
        self.z = self.spike(self.v - 0.3)
        return self.z + 0.1 * self.v


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (Recurrent, (5,)),
    "convolution": (Convolutional, (2, 4, 4)),
}


def stepped(model: nn.Module, x_seq: Tensor) -> Tensor:
    model = copy.copy(model)  # shares the parameters; the state is its own
    return torch.stack([model(x) for x in x_seq])


def inputs(shape: tuple[int, ...], T: int = 5, N: int = 2) -> Tensor:
    return torch.randn(T, N, *shape, dtype=torch.float64)


def mixed_steps_of(net: snnfx.Net) -> list[MixedStep]:
    regions = [region for region in net.region_modules().values() if isinstance(region, LoopRegion)]
    in_use = [region.kernels.in_use for region in regions if region.kernels is not None]
    return [step for step in in_use if isinstance(step, MixedStep)]


def kept_of(net: snnfx.Net) -> list[object]:
    schedules = [schedule for step in mixed_steps_of(net) for schedule in step._schedules()]
    return [run for schedule in schedules for run in schedule.kept_runs.values() if run is not None]


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, snnfx.Net, tuple[int, ...]]:
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make().double()
    return model, snnfx.convert(model, example_inputs=inputs(shape)[0]), shape


def test_repeated_calls_equal_stepping_with_new_inputs_and_weights(
    case: tuple[nn.Module, snnfx.Net, tuple[int, ...]],
) -> None:
    model, net, shape = case
    with torch.no_grad():
        for _ in range(CALLS):
            x_seq = inputs(shape)
            assert_same(net(x_seq), stepped(model, x_seq))
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert kept_of(net)


def test_repeated_training_steps_have_the_gradients_of_stepping(
    case: tuple[nn.Module, snnfx.Net, tuple[int, ...]],
) -> None:
    model, net, shape = case
    parameters = list(model.parameters())
    for _ in range(CALLS):
        x_seq = inputs(shape).requires_grad_()
        weights = torch.randn_like(stepped(model, x_seq))
        expected = torch.autograd.grad((stepped(model, x_seq) * weights).sum(), (x_seq, *parameters))
        assert_same(torch.autograd.grad((net(x_seq) * weights).sum(), (x_seq, *parameters)), expected)
    assert len(kept_of(net)) >= 2


@pytest.mark.parametrize("moves", [False, True])
def test_parameters_that_change_in_place_or_move_to_other_memory_are_read_at_each_call(
    case: tuple[nn.Module, snnfx.Net, tuple[int, ...]], moves: bool
) -> None:
    model, net, shape = case
    x_seq = inputs(shape)
    earlier = []  # memory that is in use is not given to another tensor
    for _ in range(2 * CALLS):
        for p in model.parameters():
            earlier.append(p.data)
            if moves:
                p.data = p.detach() * 1.1
            else:
                p.data.mul_(1.1)  # which leaves the version of the parameter
        with torch.no_grad():
            assert_same(net(x_seq), stepped(model, x_seq))
        net(x_seq).sum().backward()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        stepped(model, x_seq).sum().backward()
        assert_same(found, [p.grad for p in model.parameters()])
        model.zero_grad()


def test_results_of_a_call_do_not_change_in_later_calls(case: tuple[nn.Module, snnfx.Net, tuple[int, ...]]) -> None:
    model, net, shape = case
    x_seqs = [inputs(shape).requires_grad_() for _ in range(CALLS)]
    results = [net.run(x_seq) for x_seq in x_seqs]  # all graphs are alive at once
    for x_seq, (y_seq, state) in zip(x_seqs, results, strict=True):
        expected = stepped(model, x_seq)
        assert_same(y_seq, expected)
        again = net.run(x_seq)
        assert_same(list(state.values()), list(again[1].values()))
        grads = torch.autograd.grad(y_seq.square().sum(), x_seq)
        assert_same(grads, torch.autograd.grad(expected.square().sum(), x_seq))


def test_other_lengths_and_batches_build_runs_of_their_own(
    case: tuple[nn.Module, snnfx.Net, tuple[int, ...]],
) -> None:
    model, net, shape = case
    with torch.no_grad():
        for T, N in [(5, 2), (1, 2), (3, 1), (5, 2), (1, 2), (3, 1), (7, 4), (5, 3), (6, 2), (5, 2), (7, 4)] * 2:
            x_seq = inputs(shape, T, N)
            assert_same(net(x_seq), stepped(model, x_seq))


def test_two_threads_never_share_a_run(case: tuple[nn.Module, snnfx.Net, tuple[int, ...]]) -> None:
    model, net, shape = case
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for _ in range(40):
                    x_seq = torch.randn(5, 2, *shape, dtype=torch.float64, generator=generator)
                    assert_same(net(x_seq), expected(x_seq))
        except BaseException as fault:
            faults.append(fault)

    def expected(x_seq: Tensor) -> Tensor:
        return stepped(model, x_seq)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Python switches threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], object], count: int = 3) -> list[BaseException]:
    """Call a function for half a second in each thread, with its index; returns the exceptions."""
    faults: list[BaseException] = []
    end = time.monotonic() + 0.5

    def repeat(index: int) -> None:
        try:
            while time.monotonic() < end and not faults:
                work(index)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


@pytest.mark.usefixtures("frequent_switches")
def test_threads_with_many_shapes_keep_runs_at_the_same_time() -> None:
    kept: dict[bound_runs.Key, bound_runs.BoundRun | None] = {}
    numbers = itertools.count()
    assert not in_threads(lambda index: bound_runs._keep(kept, (index, next(numbers) % 9), None))


@pytest.mark.usefixtures("frequent_switches")
def test_each_thread_reads_its_own_parameters(case: tuple[nn.Module, snnfx.Net, tuple[int, ...]]) -> None:
    _, net, shape = case
    net(inputs(shape))
    (step,) = mixed_steps_of(net)
    values = [step.recording.values[number] for number, _ in step.constants]
    constants = [[torch.randn(v.shape, dtype=v.dtype) for v in values] for _ in range(3)]

    def work(index: int) -> None:
        found = step.invariants(constants[index])
        read = [found[number].data_ptr() for number, _ in step.constants]
        assert read == [c.data_ptr() for c in constants[index]]

    assert not in_threads(work)


def test_parameters_that_are_lazily_negated_at_the_same_address_are_read_as_such(
    case: tuple[nn.Module, snnfx.Net, tuple[int, ...]],
) -> None:
    model, net, shape = case
    for k in range(3 * CALLS):
        x_seq = inputs(shape)
        if k % CALLS == 0 and k:
            for p in model.parameters():
                p.data = torch._neg_view(p.data)
        with torch.no_grad():
            assert_same(net(x_seq), stepped(model, x_seq))
        assert_same(net(x_seq), stepped(model, x_seq))


def test_another_default_device_changes_no_run() -> None:
    torch.manual_seed(0)
    model = Convolutional().double()
    net = snnfx.convert(model, example_inputs=inputs((2, 4, 4))[0])
    x_seqs = [inputs((2, 4, 4)) for _ in range(CALLS)]
    for x_seq in x_seqs:
        expected = stepped(model, x_seq)
        with torch.device("meta"):
            y_seq = net(x_seq)
            y_seq.sum().backward()
        assert_same(y_seq, expected)


def test_inference_mode_and_training_may_alternate(case: tuple[nn.Module, snnfx.Net, tuple[int, ...]]) -> None:
    model, net, shape = case
    for _ in range(CALLS):
        x_seq = inputs(shape)
        with torch.inference_mode():
            y_seq = net(x_seq)
        assert y_seq.is_inference()
        with torch.no_grad():
            assert_same(net(x_seq), stepped(model, x_seq))
        net(x_seq).sum().backward()
        assert_same(y_seq.clone(), stepped(model, x_seq).detach())


def test_copies_and_pickles_of_a_net_run_alike(case: tuple[nn.Module, snnfx.Net, tuple[int, ...]]) -> None:
    _, net, shape = case
    x_seq = inputs(shape)
    with torch.no_grad():
        for _ in range(CALLS):
            y_seq = net(x_seq)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            for _ in range(CALLS):
                assert_same(other(x_seq), y_seq)


def test_a_given_state_starts_a_repeated_run(case: tuple[nn.Module, snnfx.Net, tuple[int, ...]]) -> None:
    _, net, shape = case
    with torch.no_grad():
        for _ in range(CALLS):
            x_seq = inputs(shape, T=6)
            first, state, *_ = net.run(x_seq[:3])
            second, _, *_ = net.run(x_seq[3:], state=state)
            assert_same(torch.cat((first, second)), net(x_seq))


def test_weights_that_are_not_finite_do_not_stay_in_a_run() -> None:
    torch.manual_seed(0)
    model = Recurrent().double()
    net = snnfx.convert(model, example_inputs=inputs((5,))[0])
    x_seq = inputs((5,))
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for _ in range(CALLS):
            model.back.weight[0, 0] = float("inf")
            torch.testing.assert_close(net(x_seq), stepped(model, x_seq), equal_nan=True)
            model.load_state_dict(good)
            assert_same(net(x_seq), stepped(model, x_seq))


def test_no_run_is_kept_beyond_the_memory_limit(
    case: tuple[nn.Module, snnfx.Net, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, net, shape = case
    monkeypatch.setattr(bound_runs, "_KEPT_BYTES", 0)
    with torch.no_grad():
        for _ in range(CALLS):
            x_seq = inputs(shape)
            assert_same(net(x_seq), stepped(model, x_seq))
    assert not kept_of(net)


def test_the_memory_of_kept_runs_is_released_with_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = bound_runs.KeptMemory()  # nets of other tests may end at any time
    monkeypatch.setattr(bound_runs, "memory", memory)
    net = snnfx.convert(Recurrent().double(), example_inputs=inputs((5,))[0])
    with torch.no_grad():
        for _ in range(CALLS):
            net(inputs((5,)))
        assert memory.bytes > 0
        kept = kept_of(net)
    del net
    kept.clear()
    gc.collect()
    assert memory.bytes == 0
