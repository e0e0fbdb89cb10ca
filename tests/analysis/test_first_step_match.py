"""Batch statistics over all time steps in nets whose first step runs other operations than the later steps.

The oracle runs each part of a model by itself: a neuron in a Python loop over time, any other layer once, with T folded
into the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.regions.region_modules import PeeledLoopRegion
from support.stepping import Run, assert_same, assert_same_run, finish_run, run_net

T, N, C = 6, 5, 4


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


class Recurrent(nn.Module):
    """A state that starts as None, with a product in the recurrence."""

    def __init__(self, size: int = C) -> None:
        super().__init__()
        self.w = nn.Linear(size, size)
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.h = x if self.h is None else torch.tanh(self.w(self.h)) + x
        return self.h


class OtherLayerFirst(Recurrent):
    """The first step has a layer, a constant and an operation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.sigmoid(self.start(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        else:
            self.h = torch.tanh(self.w(self.h)) + x
        return self.h * 2


class NormOnlyFirst(Recurrent):
    """A norm that the first step calls alone, on its own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.norm(x) if self.h is None else torch.tanh(self.w(self.h)) + x
        return self.h


class TwoStates(Recurrent):
    """Two states of one cycle and an output that is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.s: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h, self.s = x, torch.zeros_like(x)
        else:
            self.h = torch.tanh(self.w(self.s)) + x
            self.s = torch.sigmoid(self.h)
        return self.s + self.h


class ConvolvedRecurrence(Recurrent):
    """A recurrence of images."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Conv2d(C, C, 3, padding=1)  # type: ignore[assignment]


STATEFUL = (Recurrent, snnfx.neuron.LIFNode)


def oracle(model: nn.Sequential, x_seq: Tensor) -> Run:
    """Outputs, gradients and buffers of running one part after the other, on a copy."""
    model = copy.deepcopy(model)
    x = x_seq.clone().requires_grad_()
    value = x
    for part in model:
        if isinstance(part, STATEFUL):
            value = torch.stack([part(step) for step in value])
        else:
            value = part(value.flatten(0, 1)).unflatten(0, value.shape[:2])
    return finish_run(model, [x], value)


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(tau=2.0, v_threshold=0.4)


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "norm in front": lambda: nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), Recurrent()),
    "norm behind": lambda: nn.Sequential(nn.Linear(3, C), Recurrent(), nn.BatchNorm1d(C)),
    "norms on both sides": lambda: nn.Sequential(
        nn.Linear(3, C), nn.BatchNorm1d(C), Recurrent(), nn.Linear(C, C), nn.BatchNorm1d(C), lif()
    ),
    "norm in front of a neuron": lambda: nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), lif(), Recurrent()),
    "cumulative average": lambda: nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C, momentum=None), Recurrent()),
    "without running statistics": lambda: nn.Sequential(
        nn.Linear(3, C), nn.BatchNorm1d(C, track_running_stats=False), Recurrent()
    ),
    "another layer at the first step": lambda: nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), OtherLayerFirst()),
    "a norm of the first step": lambda: nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), NormOnlyFirst()),
    "two recurrences": lambda: nn.Sequential(
        nn.Linear(3, C), nn.BatchNorm1d(C), Recurrent(), nn.BatchNorm1d(C), Recurrent(), nn.BatchNorm1d(C)
    ),
    "two states": lambda: nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), TwoStates(), nn.BatchNorm1d(C), lif()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"lower": None}, {"checkpoint": "regions"}], ids=str)
@pytest.mark.filterwarnings("error:SNNFX")
def test_statistics_are_those_of_all_time_steps(name: str, options: dict[str, Any]) -> None:
    model, x_seq = MODELS[name](), torch.randn(T, N, 3)
    net = snnfx.convert(model, example_inputs=x_seq[0], **options)
    for _ in range(3):  # the later calls run bound
        expected = oracle(model, x_seq)
        assert_same_run(run_net(net, x_seq), expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_sequences(steps: int) -> None:
    model, x_seq = MODELS["norms on both sides"](), torch.randn(steps, N, 3)
    expected = oracle(model, x_seq)
    assert_same_run(run_net(snnfx.convert(model, example_inputs=x_seq[0]), x_seq), expected)


def test_norms_of_images() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, C, 3), nn.BatchNorm2d(C), ConvolvedRecurrence(), nn.BatchNorm2d(C), nn.Conv2d(C, 2, 3)
    )
    x_seq = torch.randn(T, 2, 2, 9, 9)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    for _ in range(3):
        expected = oracle(model, x_seq)
        assert_same_run(run_net(net, x_seq), expected)


def test_reduced_outputs() -> None:
    model, x_seq = MODELS["norms on both sides"](), torch.randn(T, N, 3)
    expected = oracle(model, x_seq).outputs.mean(0)
    assert_same(snnfx.convert(model, example_inputs=x_seq[0], reduce="mean")(x_seq).detach(), expected)


def test_the_state_continues_a_sequence() -> None:
    model, x_seq = MODELS["norm in front"](), torch.randn(T, N, 3)
    model[1].eval()
    net = snnfx.convert(model, example_inputs=x_seq[0])
    whole = net(x_seq)
    head, state = net.run(x_seq[:2])
    tail, _ = net.run(x_seq[2:], state=state)
    assert_same(torch.cat((head, tail)).detach(), whole.detach())


def test_a_neuron_that_starts_alike_keeps_its_kernel_from_the_reset_state() -> None:
    net = snnfx.convert(MODELS["norms on both sides"](), example_inputs=torch.randn(N, 3))
    peeled = [isinstance(m, PeeledLoopRegion) for name, m in net.region_modules().items() if name.startswith("loop")]
    assert peeled == [True, False]


def test_evaluation_mode_steps_the_model() -> None:
    model, x_seq = MODELS["norms on both sides"](), torch.randn(T, N, 3)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    net(x_seq)
    net.eval()
    assert_same(net(x_seq).detach(), oracle(model, x_seq).outputs)


def test_explain_names_the_loop_with_the_first_step() -> None:
    net = snnfx.convert(MODELS["norms on both sides"](), example_inputs=torch.randn(N, 3))
    assert "separate graph of loop_1 (SNNFX212)" in " ".join(str(snnfx.explain(net)).split())


class Maximum(nn.Module):
    """A state without a cycle: the first step differs outside the loops."""

    def __init__(self, initial: bool = False) -> None:
        super().__init__()
        self.bn, self.initial = nn.BatchNorm1d(C), initial
        self.before: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.initial and self.before is None:
            self.before = torch.full_like(x, -torch.inf)
        y = x if self.before is None else torch.maximum(x, self.before)
        self.before = x
        return self.bn(y)


def test_a_difference_outside_the_loops_is_a_warning_and_shows_in_explain() -> None:
    snnfx.errors._warned.clear()
    net, x_seq = snnfx.convert(Maximum(), example_inputs=torch.randn(N, C)), torch.randn(T, N, C)
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX224 .*`bn`"):
        net(x_seq)
    text = " ".join(str(snnfx.explain(net)).split())
    assert "BatchNorm in `bn`: training uses the statistics of the first step for the first step" in text
    assert "statistics over all T*N samples" not in text
