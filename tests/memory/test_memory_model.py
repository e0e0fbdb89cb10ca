"""The memory model predicts the peak of a run, which an independent meter measures, from shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.errors import InputError
from snnfx.memory.memory_model import MemoryModel, NotPredictable, model_memory
from snnfx.memory.timeline import inference_peak, training_peak
from snnfx.memory.training_planner import packed_parts
from support.measured_memory import OPTIONS, measured, with_statistics, without_statistics
from support.nets import ACCEPTANCE


def predicted(net: Any, x_seq: Tensor, training: bool) -> float:
    T = x_seq.shape[0]
    if not training:
        return inference_peak(model_memory(net._executable, [x_seq], None, training=False), T).bytes
    plan = net.recompute_plan(T, x_seq) if net.options.checkpoint else RecomputePlan()
    model = model_memory(net._executable, [x_seq], None, training=True, in_tiles=plan.packs)
    return training_peak(model, T, plan, packed_parts(net._executable, model, x_seq.element_size())).bytes


@pytest.mark.parametrize("T", [8, 16])
@pytest.mark.parametrize("N", [2, 9])
@pytest.mark.parametrize("name", ["csnn", "residual", "unet"])
def test_peak_of_inference_is_predicted(name: str, N: int, T: int) -> None:
    acceptance = ACCEPTANCE[name]
    # In float64, where convolutions need no workspace: a dispatch mode cannot see it.
    net = snnfx.convert(acceptance.make().double().eval(), example_inputs=acceptance.example(torch.float64), **OPTIONS)
    x_seq = torch.rand(T, N, *acceptance.shapes[0][1:], dtype=torch.float64)
    assert predicted(net, x_seq, False) == pytest.approx(measured(net, x_seq, False), rel=0.15)


@pytest.mark.parametrize("T", [8, 16])
@pytest.mark.parametrize("name", ["csnn", "residual", "unet"])
@pytest.mark.parametrize("checkpoint", [None, "selective", "regions"])
def test_peak_of_training_is_predicted(name: str, T: int, checkpoint: str | None) -> None:
    acceptance = ACCEPTANCE[name]
    model = acceptance.make().double()
    net = snnfx.convert(model, example_inputs=acceptance.example(torch.float64), checkpoint=checkpoint, **OPTIONS)
    x_seq = torch.rand(T, 16, *acceptance.shapes[0][1:], dtype=torch.float64)
    assert predicted(net, x_seq, True) == pytest.approx(measured(net, x_seq, True), rel=0.15)


def test_prediction_runs_no_hook_and_changes_nothing() -> None:
    model = with_statistics(dropout=0.5)
    net = snnfx.convert(model, chunk=None)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x_seq = torch.rand(4, 2, 2, 6, 6)
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    model_memory(net._executable, [x_seq], None, training=True)
    assert calls == [] and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not p.is_meta and p.grad is None for p in model.parameters())


def model_of(net: Any, x_seq: Tensor, training: bool = False) -> MemoryModel:
    return model_memory(net._executable, [x_seq], None, training)


def test_peak_grows_with_the_steps_and_the_batch() -> None:
    net = snnfx.convert(without_statistics().eval())
    small, large = model_of(net, torch.rand(2, 4, 5)), model_of(net, torch.rand(2, 8, 5))
    peaks = [inference_peak(small, k).bytes for k in (1, 2, 4, 8)]
    assert peaks == sorted(peaks) and peaks[-1] > 4 * peaks[0]
    assert inference_peak(large, 8).bytes == pytest.approx(2 * peaks[-1], rel=0.05)


def test_inference_does_not_count_what_kernels_save_for_backward() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), neuron.ParametricLIFNode()).eval()
    x_seq = torch.rand(8, 32, 64)
    one, state = 8 * 32 * 64 * 4, 32 * 64 * 4
    found = inference_peak(model_of(snnfx.convert(model, example_inputs=x_seq[0]), x_seq), 8).bytes
    assert 2 * one <= found <= 2 * one + 2 * state


def test_model_that_depends_on_values_is_not_predicted() -> None:
    class DependsOnValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(x[x.sum(1) > 0])

    net = snnfx.convert(DependsOnValues().eval())
    with pytest.raises(NotPredictable):
        model_of(net, torch.rand(3, 4, 5))


def test_chunk_is_the_largest_that_fits_the_budget() -> None:
    x_seq = torch.rand(64, 32, 5)
    free = snnfx.convert(without_statistics().eval())
    model = model_of(free, x_seq)
    budget = int(inference_peak(model, 7).bytes)
    net = snnfx.convert(without_statistics().eval(), memory_budget=budget)
    length = net.chunk_plan(x_seq).length
    assert length is not None
    assert inference_peak(model, length).bytes <= budget * 1.001 and inference_peak(model, length + 1).bytes > budget


def test_chunks_are_planned_when_the_first_state_is_the_callers() -> None:
    net = snnfx.convert(without_statistics().eval(), memory_budget=60_000)
    x_seq = torch.rand(64, 32, 5)
    with torch.no_grad():
        whole, state = net.run(x_seq[:4])
        assert net.chunk_plan(x_seq, state=state).length is not None
        expected, _ = snnfx.convert(net.source, chunk=None).run(x_seq, state=state)
        y, _ = net.run(x_seq, state=state)
    assert torch.equal(y, expected) and whole.shape[0] == 4


def test_budget_that_cannot_be_met_names_the_minimum_and_the_largest_tensors() -> None:
    net = snnfx.convert(without_statistics().eval(), memory_budget=1000)
    named = r"SNNFX318 .*1000 bytes.*(fold|loop)_.*largest tensors are .*(Linear|LIFNode|state)"
    with torch.no_grad(), pytest.raises(InputError, match=named) as raised:
        net(torch.rand(8, 32, 5))
    least = int(raised.value.hint.partition("memory_budget=")[2].split()[0])
    enough = snnfx.convert(net.source, memory_budget=least)
    with torch.no_grad():
        enough(torch.rand(8, 32, 5))


def test_inference_with_autograd_gets_the_hint_no_grad() -> None:
    x_seq = torch.rand(8, 32, 5)
    model = without_statistics().eval()
    with torch.no_grad():
        peak = inference_peak(model_of(snnfx.convert(model), x_seq), 1).bytes
    net = snnfx.convert(model, memory_budget=int(1.1 * peak))
    with pytest.raises(InputError, match="SNNFX318") as raised:
        net(x_seq)
    assert "with torch.no_grad()" in raised.value.hint
    with torch.no_grad():
        net(x_seq)
    with pytest.raises(InputError, match="SNNFX318") as raised:
        net.train()(x_seq)
    assert "no_grad" not in raised.value.hint


def test_plan_names_the_budget_or_says_that_none_is_set() -> None:
    net = snnfx.convert(without_statistics())
    plan = net.recompute_plan(8, torch.rand(8, 32, 5))
    assert "no memory_budget is set" in plan.reason and not plan.segments
    net = snnfx.convert(without_statistics(), memory_budget="1GiB")
    assert "memory_budget is 1.0 GiB" in net.recompute_plan(8, torch.rand(8, 32, 5)).reason


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((16,), "SNNFX307"), ((torch.rand(16, 32, 5),), "SNNFX309"), ((8, torch.rand(16, 32, 5)), "SNNFX303")]
    + [((2, torch.rand(2, 32, 5), torch.rand(2)), "SNNFX307"), ((2, [1, 2]), "SNNFX305"), ((True,), "SNNFX309")]
    + [((0, torch.rand(0, 32, 5)), "SNNFX301"), ((2, torch.tensor(1.0)), "SNNFX306")],
)
def test_recompute_plan_checks_its_arguments(arguments: Any, code: str) -> None:
    with pytest.raises(InputError, match=code):
        snnfx.convert(without_statistics()).recompute_plan(*arguments)


@pytest.mark.parametrize("training", [False, True])
def test_convert_refuses_a_budget_that_not_even_one_step_fits(training: bool) -> None:
    model = without_statistics().train(training)
    with pytest.raises(InputError, match="SNNFX318") as raised:
        snnfx.convert(model, example_inputs=torch.rand(32, 5), memory_budget=1000)
    least = int(raised.value.hint.partition("memory_budget=")[2].split()[0])
    net = snnfx.convert(model, example_inputs=torch.rand(32, 5), memory_budget=least)
    with torch.set_grad_enabled(training):
        net(torch.rand(1, 32, 5))


def test_training_recomputes_no_more_than_the_budget_requires() -> None:
    x_seq = torch.rand(16, 32, 2, 6, 6)
    plain = snnfx.convert(with_statistics(), checkpoint=None)
    needed = training_peak(model_of(plain, x_seq, True), 16, RecomputePlan(), {}).bytes
    counts = []
    for part in (1.1, 0.95, 0.85):
        net = snnfx.convert(with_statistics(), memory_budget=int(needed * part))
        counts.append(len(net.recompute_plan(16, x_seq).segments))
    assert counts[0] == 0 < counts[1] <= counts[2]


def test_training_within_a_budget_has_the_same_gradients() -> None:
    x_seq = torch.rand(16, 8, 2, 6, 6, dtype=torch.float64)
    plain = snnfx.convert(with_statistics().double(), checkpoint=None)
    needed = training_peak(model_of(plain, x_seq, True), 16, RecomputePlan(), {}).bytes
    import copy

    net = snnfx.convert(copy.deepcopy(plain.source), memory_budget=int(needed * 0.8))
    net(x_seq).square().sum().backward()
    plain(x_seq).square().sum().backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("2G", 2 * 2**30), ("2GiB", 2 * 2**30), ("2gib", 2 * 2**30), ("2GB", 2 * 10**9), ("512mb", 512 * 10**6)]
    + [("512M", 512 * 2**20), ("1.5 KiB", 1536), ("2e9", 2 * 10**9), ("1000", 1000), ("100b", 100), ("0.5", 0.5)],
)
def test_budget_as_text(text: str, budget: float) -> None:
    found = snnfx.convert(without_statistics(), memory_budget=text).options.memory_budget
    assert found == budget and type(found) is type(budget)


def test_a_float_above_one_is_not_taken_for_bytes() -> None:
    with pytest.raises(InputError, match="SNNFX309") as raised:
        snnfx.convert(without_statistics(), memory_budget=2e9)
    assert "int(2e9)" in raised.value.hint


@pytest.mark.parametrize("budget", [0, -5, 1.5, 0.0, True, "much", "", "0GiB", "2GG", "-1", "nan", b"1", float("nan")])
def test_invalid_budget_is_refused(budget: Any) -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.convert(without_statistics(), memory_budget=budget)
