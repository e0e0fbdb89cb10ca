"""When plans are made, what they are kept for, and what is told where a budget cannot be kept."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.flop_counter import FlopCounterMode

import snnfx
from snnfx import errors, neuron
from snnfx.errors import InputError, SnnfxWarning


@pytest.fixture(autouse=True)
def warnings_as_for_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


def layers(width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, width), neuron.LIFNode(), nn.Linear(width, width), neuron.LIFNode(), nn.Linear(width, 2)
    )


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode()
        self.look = Look()

    def forward(self, x: Tensor) -> Tensor:
        return self.look(self.lif(x))  # type: ignore[no-any-return]


class Look(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1 else x


def messages(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, SnnfxWarning)]


@pytest.mark.parametrize("training", [True, False])
def test_a_budget_for_a_net_that_looks_at_values_is_told(training: bool) -> None:
    x_seq = torch.rand(6, 2, 4)

    def run() -> None:
        net = snnfx.convert(LooksAtValues().train(training), example_inputs=x_seq[0], memory_budget=2**20)
        with torch.set_grad_enabled(training):
            net(x_seq)

    told = [m for m in messages(run) if "SNNFX508" in m]
    assert len(told) == 1 and "told from shapes" in told[0]
    assert not any("SNNFX508" in m for m in messages(run))


def test_no_budget_no_warning() -> None:
    net = snnfx.convert(LooksAtValues(), example_inputs=torch.rand(2, 4))
    assert not any("SNNFX508" in m for m in messages(lambda: net(torch.rand(6, 2, 4))))


def test_a_counter_in_the_step_can_be_predicted() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif, self.steps = neuron.LIFNode(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return self.lif(x) * self.steps  # type: ignore[no-any-return]

    net = snnfx.convert(Counting(), example_inputs=torch.rand(2, 4))
    assert "not known" not in net.recompute_plan(6, torch.rand(6, 2, 4)).reason


class FirstStepOfItsOwn(nn.Module):
    """The largest potential so far; there is none before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.lif, self.v, self.best = neuron.LIFNode(), 0.0, None

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v + (self.lif(x) - self.v) / 2.0
        self.best = self.v if self.best is None else torch.max(self.best, self.v)  # type: ignore[assignment]
        return self.best  # type: ignore[return-value]


def test_a_net_whose_first_step_differs_can_be_predicted() -> None:
    x_seq = torch.rand(6, 2, 4)
    net = snnfx.convert(FirstStepOfItsOwn(), example_inputs=x_seq[0])
    assert net.program.first_step is not None
    assert "not known" not in net.recompute_plan(6, x_seq.requires_grad_()).reason
    assert "not known" not in net.chunk_plan(x_seq).reason


def test_what_cannot_be_predicted_leaves_no_code_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    net = snnfx.convert(LooksAtValues(), example_inputs=torch.rand(2, 4))
    assert "not known" in net.chunk_plan(torch.rand(6, 2, 4)).reason
    assert "traced Module" not in capfd.readouterr().err


def test_cells_that_keep_their_size_in_a_tensor_can_be_predicted() -> None:
    norse = pytest.importorskip("norse.torch")
    model = norse.SequentialState(nn.Linear(5, 6), norse.LIFRecurrentCell(6, 4))
    net = snnfx.convert(model, example_inputs=torch.rand(3, 5))
    assert "not known" not in net.recompute_plan(6, torch.rand(6, 3, 5)).reason


def test_plans_are_made_anew_when_parameters_are_frozen_or_thawed() -> None:
    x_seq = torch.rand(16, 16, 8)
    whole = snnfx.convert(layers(), example_inputs=x_seq[0], memory_budget=2**30)
    frozen = snnfx.convert(layers(), example_inputs=x_seq[0], memory_budget=2**30)
    frozen.requires_grad_(False)
    last: Any = frozen[4] if isinstance(frozen, nn.Sequential) else frozen.get_submodule("4")
    last.requires_grad_(True)
    few = frozen.recompute_plan(16, x_seq).reason
    frozen.requires_grad_(True)
    assert frozen.recompute_plan(16, x_seq).reason == whole.recompute_plan(16, x_seq).reason != few


def test_plans_are_not_seen_by_the_modes_and_hooks_of_the_caller() -> None:
    x_seq = torch.rand(6, 2, 8)

    def net() -> Any:
        return snnfx.convert(layers(), example_inputs=x_seq[0], memory_budget=2**30)

    expected = net().recompute_plan(6, x_seq).reason
    saving = net()
    with torch.autograd.graph.save_on_cpu():
        saving(x_seq).sum().backward()
    assert saving.recompute_plan(6, x_seq).reason == expected
    torch_checkpoint(net(), x_seq, use_reentrant=False).sum().backward()
    counts = []
    warm = net()
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            warm(x_seq)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_plan_that_was_asked_for_and_does_not_fit_is_told() -> None:
    x_seq = torch.rand(16, 16, 8)
    net = snnfx.convert(layers(), example_inputs=x_seq[0], checkpoint="regions", memory_budget=1000)
    assert any("SNNFX508" in m and 'checkpoint="auto"' in m for m in messages(lambda: net(x_seq)))


def test_hooks_that_keep_the_history_are_told() -> None:
    x_seq = torch.rand(6, 2, 8)
    net = snnfx.convert(layers(), example_inputs=x_seq[0], checkpoint="regions")
    net.get_submodule("1").register_forward_hook(lambda module, given, result: None)
    assert any("SNNFX504" in m and "forward hooks" in m for m in messages(lambda: net(x_seq)))


def test_recording_keeps_the_history_and_says_so() -> None:
    x_seq = torch.rand(6, 2, 8)
    net = snnfx.convert(layers(), example_inputs=x_seq[0], checkpoint="regions")
    assert any("SNNFX508" in m and "record=" in m for m in messages(lambda: net.run(x_seq, record=("1",))))


@pytest.mark.parametrize("reduce", [None, "mean"])
def test_recording_goes_with_chunks_in_inference(reduce: str | None) -> None:
    model, x_seq = layers().double().eval(), torch.rand(7, 2, 8, dtype=torch.float64)
    whole = snnfx.convert(model, chunk=None, reduce=reduce)
    net = snnfx.convert(model, chunk=3, reduce=reduce)
    with torch.no_grad():
        expected = whole.run(x_seq, record=("1", "3.v"))
        found = net.run(x_seq, record=("1", "3.v"))
    torch.testing.assert_close(found, expected)


def test_time_is_not_cut_where_statistics_without_running_ones_go_over_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), neuron.LIFNode())
    with pytest.raises(InputError, match="SNNFX317"):
        snnfx.convert(model, checkpoint=2)


def test_statistics_of_each_step_without_momentum_can_be_predicted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), neuron.LIFNode())
    x_seq = torch.rand(6, 3, 4)
    net = snnfx.convert(model, example_inputs=x_seq[0], batch_norm="per_step", memory_budget=2**20)
    assert "not known" not in net.recompute_plan(6, x_seq).reason
    assert int(model[1].num_batches_tracked) == 0


def test_nothing_is_planned_where_nothing_was_asked_for() -> None:
    x_seq = torch.rand(16, 16, 8)
    net = snnfx.convert(layers(), example_inputs=x_seq[0], checkpoint=None, memory_budget=1000)
    assert net.recompute_plan(16, x_seq).segments == ()
    net(x_seq).sum().backward()


def test_models_that_pass_their_state_are_planned_from_it() -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            v = 0.5 * v + self.fc(x)
            return torch.tanh(v), v

    x_seq, v = torch.rand(16, 32, 4), torch.zeros(32, 4)
    net = snnfx.convert(Explicit(), example_inputs=(x_seq[0], v), carry={"v": 1}, memory_budget=30_000)
    assert not any("SNNFX508" in m for m in messages(lambda: net(x_seq, v)))
    assert any(plan.steps is not None or plan.segments for plan in net._execution.plans._recompute_plans.values())


def test_an_online_rule_says_that_it_does_not_look_at_the_budget() -> None:
    from snnfx.online import OTTT_A, Trainer

    net = snnfx.convert(layers(), memory_budget=2**30)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def run() -> None:
        trainer = Trainer(net, OTTT_A, optimizer, nn.functional.cross_entropy, target_dim=None)
        trainer.step(torch.rand(4, 3, 8), torch.zeros(3, dtype=torch.int64))

    assert any("SNNFX508" in m and "online rule" in m for m in messages(run))
