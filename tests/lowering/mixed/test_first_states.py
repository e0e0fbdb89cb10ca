"""Initial states of mixed loops whose modules initialise their own state are found in the calls of the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.lowering.aten_recording import LoweringRefused, record_step
from snnfx.lowering.elementwise.aten_table import decomposition
from snnfx.lowering.mixed import batched_calls
from snnfx.lowering.mixed.first_states import initial_states_by_calls
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.region_modules import LoopRegion
from support.stepping import assert_same


class Feedback(snnfx.MemoryModule):
    """Feeds its output back through a layer; capture keeps it as one call.

    Args:
        start: the state before the first step, from the input.
    """

    def __init__(self, start: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rec, self.start = nn.Linear(8, 4), start
        self.register_memory("y", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.y is None:
            self.y = self.start(x)
        self.y = torch.tanh(self.rec(torch.cat([x, self.y], dim=-1)))
        return self.y


class Keyed(Feedback):
    """The first step makes another call than the others."""

    def forward(self, x: Tensor) -> Tensor:
        if self.y is None:
            self.y = torch.zeros_like(x)
            x = 2 * x
        return super().forward(x)


def with_container(start: Callable[[Tensor], Tensor], kind: type[Feedback] = Feedback) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), kind(start), nn.Linear(4, 2)).double()


def stepped(model: nn.Module, x_seq: Tensor) -> Tensor:
    snnfx.functional.reset_net(model)
    y_seq = torch.stack([model(x) for x in x_seq])
    snnfx.functional.reset_net(model)
    return y_seq


def numbers(net: snnfx.Net) -> list[Any]:
    """The initial states of the mixed loops of a net."""
    loops = (m for m in net.region_modules().values() if isinstance(m, LoopRegion) and m.kernels is not None)
    entries = [entry for loop in loops for entry in loop.kernels.entries.values()]  # type: ignore[union-attr]
    return [e.initial and e.initial.numbers for e in entries if isinstance(e.lowered, MixedStep)]


def check(model: nn.Module, T: int) -> snnfx.Net:
    """Compare with stepping, for outputs and gradients."""
    x_seq = torch.linspace(-2, 2, T * 12, dtype=torch.float64).view(T, 3, 4).requires_grad_()
    net = snnfx.convert(model, example_inputs=x_seq[0].detach())
    expected = stepped(model, x_seq)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), (x_seq, *parameters))
    for _ in range(3):
        y_seq = net(x_seq)
        assert_same(y_seq, expected)
        assert_same(torch.autograd.grad(y_seq.square().sum(), (x_seq, *parameters)), wanted)
    return net


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_MEASURE", "0")


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_filled_states_are_numbers(T: int, value: float) -> None:
    assert numbers(check(with_container(lambda x: torch.full_like(x, value)), T)) == [(value,)]


@pytest.mark.parametrize("T", [1, 2, 5])
def test_states_that_depend_on_the_input_are_computed(T: int) -> None:
    assert (0.0,) not in numbers(check(with_container(lambda x: 0.5 * x), T))


@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_first_step_with_other_calls_runs_itself(T: int) -> None:
    check(with_container(torch.zeros_like, Keyed), T)


def _container(T: int) -> tuple[snnfx.Net, Tensor]:
    container = pytest.importorskip("spikingjelly.activation_based.layer").LinearRecurrentContainer
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), container(sj.IFNode(detach_reset=True), 4, 4)).double()
    x_seq = torch.rand(T, 3, 4).double() * 3
    return snnfx.convert(model, example_inputs=x_seq[0]), x_seq


def test_a_container_of_spikingjelly_starts_from_numbers() -> None:
    net, x_seq = _container(4)
    y_seq = net(x_seq)
    assert numbers(net) == [(0.0, 0.0)]
    assert torch.equal(net(x_seq), y_seq)


def test_joined_values_of_all_steps_need_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_calls, "_mapped", lambda *_: pytest.fail("mapped"))
    net, x_seq = _container(4)
    net(x_seq).sum().backward()


WEIGHT = torch.randn(4, 4)


def later_step(x: Tensor, state: tuple[Tensor, ...]) -> Any:
    y = torch.tanh(x @ WEIGHT + state[0])
    return (y,), (y,)


def starts(first: Callable[[Tensor], Tensor]) -> Any:
    x = torch.randn(3, 4)
    later = record_step(later_step, [x], [x], False, decomposition)
    begin = record_step(lambda x: later_step(x, (first(x),)), [x], None, False, decomposition)
    return initial_states_by_calls(later, begin)


@pytest.mark.parametrize(
    ("first", "number"),
    [
        (torch.zeros_like, 0.0),
        (lambda x: torch.full_like(x @ WEIGHT, 0.25).detach(), 0.25),
        (lambda x: x.new_ones(3, 4) * 2, 2.0),
    ],
)
def test_calls_of_both_steps_give_the_number(first: Callable[[Tensor], Tensor], number: float) -> None:
    assert starts(first).numbers == (number,)


@pytest.mark.parametrize(
    "first",
    [
        lambda x: 0.5 * x,
        lambda x: x.new_zeros(4),
        lambda x: torch.zeros_like(x, dtype=torch.float64),
        lambda x: torch.arange(12.0).view(3, 4),
    ],
    ids=["of the input", "smaller", "another dtype", "no number"],
)
def test_other_initial_states_are_refused(first: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(LoweringRefused):
        starts(first)


def test_a_first_step_with_other_numbers_is_refused() -> None:
    x = torch.randn(3, 4)
    later = record_step(later_step, [x], [x], False, decomposition)
    begin = record_step(lambda x: later_step(2 * x, (torch.zeros_like(x),)), [x], None, False, decomposition)
    with pytest.raises(LoweringRefused, match="something else"):
        initial_states_by_calls(later, begin)
