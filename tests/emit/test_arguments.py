"""What a net is called with: batch sizes, states and time dimensions that fit, and those that do not."""

from __future__ import annotations

import gc
import importlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError
from support.stepping import fresh_copy, step_model

pytestmark = pytest.mark.filterwarnings("ignore:SNNFX102")


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4, dtype=torch.float64)
        self.lif = neuron.LIFNode(tau=2.0, v_threshold=0.4)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.lif(self.fc(x) + bias)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("examples", [False, True], ids=["without examples", "with examples"])
@pytest.mark.parametrize("shape", [(5, 2, 4), (5, 1, 4), (5, 4), (5, 1)], ids=str)
def test_a_second_input_may_have_a_batch_of_one_or_none(shape: tuple[int, ...], examples: bool) -> None:
    model, x, bias = TwoInputs(), sequence(5, 2, 3), sequence(*shape)
    net = snnfx.convert(model, example_inputs=(x[0], bias[0]) if examples else None)
    torch.testing.assert_close(net(x, bias), step_model(fresh_copy(model), x, bias))


@pytest.mark.parametrize("examples", [None, (torch.rand(2, 3).double(), torch.rand(2, 4).double())])
def test_batches_of_different_sizes_are_named(examples: tuple[Tensor, ...] | None) -> None:
    net = snnfx.convert(TwoInputs(), example_inputs=examples)
    with pytest.raises(InputError, match=r"`x`: 2.*`bias`: 3") as raised:
        net(sequence(5, 2, 3), sequence(5, 3, 4))
    assert raised.value.code == "SNNFX303"


def net_and_state() -> tuple[snnfx.Net, Tensor, dict[str, Tensor]]:
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), neuron.LIFNode(tau=2.0)).double())
    x = sequence(5, 2, 3)
    return net, x, net.run(x)[1]


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (1, 2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_state_of_another_batch_is_refused_before_anything_runs(shape: tuple[int, ...], step_mode: str) -> None:
    net, x, _ = net_and_state()
    net = net.convert_to(step_mode)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(InputError, match=r"`2\.v` has shape") as raised:
        net.run(x if step_mode == "m" else x[0], state={"2.v": torch.zeros(shape, dtype=torch.float64)})
    assert raised.value.code == "SNNFX308"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_state_that_fits_is_taken() -> None:
    net, x, state = net_and_state()
    net.eval()
    first, state = net.run(x[:2])
    second, _ = net.run(x[2:], state=state)
    torch.testing.assert_close(torch.cat([first, second]), net(x))


def test_a_state_may_be_a_number() -> None:
    net, x, _ = net_and_state()
    torch.testing.assert_close(net.run(x, state={"2.v": 0.0})[0], net(x))


@pytest.mark.parametrize("time_dim", [True, False, (True, 0), {"x": 0, "bias": False}], ids=str)
def test_a_bool_is_no_time_dimension(time_dim: object) -> None:
    with pytest.raises(InputError, match="contains a bool") as raised:
        snnfx.convert(TwoInputs(), time_dim=time_dim)
    assert raised.value.code == "SNNFX309"


def test_inputs_that_the_plan_does_not_cover_are_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from snnfx.emit.arguments import Arguments

    model, x, bias = TwoInputs(), sequence(5, 2, 3), sequence(5, 1, 4)
    net = snnfx.convert(model)
    calls = []
    original = Arguments.bind
    monkeypatch.setattr(Arguments, "bind", lambda self, *given: calls.append(1) or original(self, *given))
    net(x, bias)
    assert len(calls) == 1


class CountedConversions:
    """Counts the captures of models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        module = importlib.import_module("snnfx.convert")
        original = module.capture_both_modes

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "capture_both_modes", counted)


def rank_free() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4).double(), neuron.LIFNode(tau=2.0, v_threshold=0.4))


@pytest.mark.parametrize("shape", [(5, 2, 3, 4), (5, 4), (5, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("call", ["forward", "run", "planned_for", "stream"])
def test_another_rank_than_the_example_is_refused_before_anything_runs(shape: tuple[int, ...], call: str) -> None:
    model, x = rank_free(), sequence(*shape)
    net = snnfx.convert(model, example_inputs=sequence(2, 4))
    calls: list[Any] = []
    for module in model:
        module.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(InputError, match=r"`input` has shape .*2 dimensions for each time step, like \[T, 2, 4\]") as e:
        list(net.stream(x.split(2))) if call == "stream" else getattr(net, call)(x)
    assert e.value.code == "SNNFX325" and calls == []
    net = snnfx.convert(model, example_inputs=x[0])  # the hint
    torch.testing.assert_close(net(x), step_model(fresh_copy(model), x))


def test_the_single_step_form_refuses_another_rank_than_the_example() -> None:
    net = snnfx.convert(rank_free(), "s", example_inputs=sequence(2, 4))
    with pytest.raises(InputError, match=r"like \[2, 4\]") as raised:
        net(sequence(2, 3, 4))
    assert raised.value.code == "SNNFX325"
    assert net(sequence(3, 4)).shape == (3, 4)


@pytest.mark.filterwarnings("ignore:SNNFX102")
@pytest.mark.parametrize("convert_in", ["training", "evaluation"])
def test_each_rank_is_planned_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch, convert_in: str) -> None:
    model = rank_free().train(convert_in == "training")
    net, captures = snnfx.convert(model), CountedConversions(monkeypatch)
    for T in range(1, 8):
        x = sequence(T, 4)
        torch.testing.assert_close(net(x), step_model(fresh_copy(model), x))
    net.train(convert_in != "training")
    net(sequence(9, 4))
    assert captures.count == 1


@pytest.mark.filterwarnings("ignore:SNNFX102")
def test_batch_sizes_are_planned_once_for_each_pattern_of_equal_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoInputs()
    net, captures = snnfx.convert(model), CountedConversions(monkeypatch)
    for T, batch in ((5, 2), (6, 3), (4, 5)):
        x, bias = sequence(T, batch, 3), sequence(T, 1, 4)
        torch.testing.assert_close(net(x, bias), step_model(fresh_copy(model), x, bias))
    assert captures.count == 1
    net(sequence(5, 1, 3), sequence(5, 2, 4))
    net(sequence(6, 1, 3), sequence(6, 3, 4))
    assert captures.count == 2


@pytest.mark.filterwarnings("ignore:SNNFX102")
def test_a_net_keeps_the_plans_of_the_latest_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class AnyRank(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum() + y.sum()

    net, captures = snnfx.convert(AnyRank()), CountedConversions(monkeypatch)

    def call(rank: int) -> weakref.ref[Any]:
        inputs = (sequence(3, *[1] * rank), sequence(3, 2))
        torch.testing.assert_close(net(*inputs), step_model(AnyRank(), *inputs))
        return weakref.ref(net.planned_for(*inputs))

    plans = [call(rank) for rank in range(12)]
    first_captures = captures.count
    assert call(11)() is not None and captures.count == first_captures
    gc.collect()
    assert 0 < len(net._nets_for_shapes.values()) <= 8
    kept = [plan() for plan in plans if plan() not in (None, net)]
    assert len(kept) == len(net._nets_for_shapes.values())


@pytest.mark.filterwarnings("ignore:SNNFX102")
def test_a_dropped_net_frees_its_model() -> None:
    model = rank_free()
    net = snnfx.convert(model)
    for T in (2, 3):
        net(sequence(T, 4))
    dead = weakref.ref(model[0])
    del net, model
    gc.collect()
    assert dead() is None
