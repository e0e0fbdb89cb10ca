"""When the net makes and reuses memory plans, and its warnings if it cannot keep a budget."""

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
from snnfx.memory import meta_run
from snnfx.sandbox import internal_faults


@pytest.fixture(autouse=True)
def forget_given_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_warned", set())


def layers(width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, width), neuron.LIFNode(), nn.Linear(width, width), neuron.LIFNode(), nn.Linear(width, 2)
    )


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode()
        self.branch = BranchOnSum()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.lif(x))  # type: ignore[no-any-return]


class BranchOnSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1 else x


def messages(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, SnnfxWarning)]


@pytest.mark.parametrize("training", [True, False])
def test_a_budget_for_a_net_that_depends_on_values_is_ignored_with_a_warning(training: bool) -> None:
    x_seq = torch.rand(6, 2, 4)

    def run() -> None:
        net = snnfx.convert(DependsOnValues().train(training), example_inputs=x_seq[0], memory_budget=2**20)
        with torch.set_grad_enabled(training):
            net(x_seq)

    ignored = [m for m in messages(run) if "SNNFX508" in m]
    assert len(ignored) == 1 and "memory_budget ignored: memory use cannot be predicted from shapes" in ignored[0]
    assert not any("SNNFX508" in m for m in messages(run))


def test_a_module_that_cannot_be_copied_is_not_predicted() -> None:
    class NotCopyable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def __deepcopy__(self, memo: Any) -> Any:
            raise OSError("a handle cannot be copied")

    model, x_seq = nn.Sequential(NotCopyable(), neuron.LIFNode()).eval(), torch.rand(6, 2, 4)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    assert "a handle cannot be copied" in net.chunk_plan(x_seq).reason
    with torch.no_grad():
        torch.testing.assert_close(net(x_seq), snnfx.convert(model, chunk=None)(x_seq))


@pytest.mark.parametrize("error", [KeyError("meta"), AssertionError(), OSError("no such kernel")])
def test_any_error_of_the_model_on_meta_tensors_leaves_memory_unpredicted(error: Exception) -> None:
    class NotOnMeta(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.device.type == "meta":
                raise error
            return 2 * x if float(x.sum()) > -1 else x

    model, x_seq = nn.Sequential(NotOnMeta(), neuron.LIFNode()).eval(), torch.rand(6, 2, 4)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    assert f"cannot be predicted from shapes ({str(error) or 'AssertionError'})" in net.chunk_plan(x_seq).reason


def test_a_fault_of_the_memory_model_is_raised_here_and_a_warning_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    x_seq = torch.rand(6, 2, 8)
    net = snnfx.convert(layers().eval(), example_inputs=x_seq[0])
    monkeypatch.setattr(meta_run, "_leaf_key", None)  # calling None raises in a frame of snnfx
    with pytest.raises(TypeError, match="not callable"):
        net.chunk_plan(x_seq)
    monkeypatch.setattr(internal_faults, "STRICT", False)
    with pytest.warns(
        SnnfxWarning, match="SNNFX509 snnfx does not plan the memory of this net: .*TypeError.*meta_run.py"
    ):
        assert net.chunk_plan(x_seq).length is None


def test_no_budget_no_warning() -> None:
    net = snnfx.convert(DependsOnValues(), example_inputs=torch.rand(2, 4))
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
    assert "cannot be predicted" not in net.recompute_plan(6, torch.rand(6, 2, 4)).reason


class FirstStepOfItsOwn(nn.Module):
    """The largest potential so far; before the first step it is None."""

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
    assert "cannot be predicted" not in net.recompute_plan(6, x_seq.requires_grad_()).reason
    assert "cannot be predicted" not in net.chunk_plan(x_seq).reason


def test_a_failed_prediction_prints_no_code_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    net = snnfx.convert(DependsOnValues(), example_inputs=torch.rand(2, 4))
    assert "cannot be predicted" in net.chunk_plan(torch.rand(6, 2, 4)).reason
    assert "traced Module" not in capfd.readouterr().err


def test_cells_that_keep_their_size_in_a_tensor_can_be_predicted() -> None:
    norse = pytest.importorskip("norse.torch")
    model = norse.SequentialState(nn.Linear(5, 6), norse.LIFRecurrentCell(6, 4))
    net = snnfx.convert(model, example_inputs=torch.rand(3, 5))
    assert "cannot be predicted" not in net.recompute_plan(6, torch.rand(6, 3, 5)).reason


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


def test_modes_and_hooks_of_the_caller_do_not_see_the_planning() -> None:
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


def test_an_explicit_checkpoint_that_exceeds_the_budget_warns() -> None:
    x_seq = torch.rand(16, 16, 8)
    net = snnfx.convert(layers(), example_inputs=x_seq[0], checkpoint="regions", memory_budget=1000)
    assert any("SNNFX508" in m and 'checkpoint="auto"' in m for m in messages(lambda: net(x_seq)))


def test_hooks_that_prevent_recomputation_warn() -> None:
    x_seq = torch.rand(6, 2, 8)
    net = snnfx.convert(layers(), example_inputs=x_seq[0], checkpoint="regions")
    net.get_submodule("1").register_forward_hook(lambda module, given, result: None)
    assert any("SNNFX504" in m and "forward hooks" in m for m in messages(lambda: net(x_seq)))


def test_recording_saves_everything_for_backward_and_warns() -> None:
    x_seq = torch.rand(6, 2, 8)
    net = snnfx.convert(layers(), example_inputs=x_seq[0], checkpoint="regions")
    assert any("SNNFX508" in m and "record=" in m for m in messages(lambda: net.run(x_seq, record=("1",))))


@pytest.mark.parametrize("reduce", [None, "mean"])
def test_recording_works_with_chunks_in_inference(reduce: str | None) -> None:
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
    assert "cannot be predicted" not in net.recompute_plan(6, x_seq).reason
    assert int(model[1].num_batches_tracked) == 0


def test_checkpoint_none_ignores_the_budget() -> None:
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


def test_an_online_rule_warns_that_it_ignores_the_budget() -> None:
    from snnfx.online import OTTT_A, Trainer

    net = snnfx.convert(layers(), memory_budget=2**30)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def run() -> None:
        trainer = Trainer(net, OTTT_A, optimizer, nn.functional.cross_entropy, target_dim=None)
        trainer.step(torch.rand(4, 3, 8), torch.zeros(3, dtype=torch.int64))

    assert any("SNNFX508" in m and "online training ignores" in m for m in messages(run))
