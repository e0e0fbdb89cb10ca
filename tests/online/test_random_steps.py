"""Gradients at random steps: whatever way they are taken, they are those of some K steps, in few runs of the net."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.online import OTTT_A, SLTT, SLTT_K
from snnfx.runtime.execution import Execution
from support.online_models import N, close, leaky_net, peak_saved_bytes, sequences
from support.online_oracles import PlainLIF, TriangleSpike, mse, sltt
from support.online_training import Trained, batch_norm_net, each_case, prepared, same

T = 5


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def of_some_steps(model: nn.Module, x_seq: Tensor, target: Tensor, K: int, found: dict[str, Tensor]) -> bool:
    """Whether gradients are those of exactly one choice of K steps."""
    choices = itertools.combinations(range(len(x_seq)), K)
    candidates = [sltt(model, x_seq, target, mse, 1 / len(x_seq), steps).gradients for steps in choices]
    return sum(all(torch.allclose(found[n], c[n], atol=1e-11, rtol=0) for n in found) for c in candidates) == 1


@each_case
@pytest.mark.parametrize("chunk", [1, 2, 3, T])
def test_gradients_are_those_of_k_steps(case: str, chunk: int) -> None:
    model, x_seq, target, _ = prepared(case)
    x_seq, target = x_seq[:T], target[:T]
    whole = Trained(model, SLTT, x_seq, target)
    found = Trained(model, SLTT_K(2), x_seq, target, chunk=chunk)
    assert of_some_steps(model, x_seq, target, 2, found.gradients)
    close(found.result.outputs, whole.result.outputs)
    close(found.result.loss, whole.result.loss)
    same(found.result.state, whole.result.state)


@each_case
@pytest.mark.parametrize("rule", [SLTT, OTTT_A], ids=lambda rule: rule.name)
@pytest.mark.parametrize("chunk", [2, None])
def test_gradients_of_all_steps_are_those_of_the_rule_without_choice(case: str, rule: Any, chunk: int | None) -> None:
    model, x_seq, target, _ = prepared(case)
    found = Trained(model, rule(random_steps=len(x_seq)), x_seq, target, chunk=chunk)
    same(found.gradients, Trained(model, rule, x_seq, target).gradients)


def test_batch_norms_see_one_step_at_a_time_and_count_it_once() -> None:
    model = batch_norm_net()
    x_seq, target = sequences(3, 1, 8, 8)
    found, whole = (Trained(model, rule, x_seq, target, chunk=3) for rule in (SLTT_K(len(x_seq)), SLTT))
    same(found.gradients, whole.gradients)
    same(dict(found.model.named_buffers()), dict(whole.model.named_buffers()))


def test_a_sequence_goes_on_from_a_given_state() -> None:
    model, x_seq, target, _ = prepared("zoo")
    rule = SLTT(loss_scale="sum")
    whole = Trained(model, rule, x_seq, target)
    first = Trained(model, rule(random_steps=3), x_seq[:3], target[:3])
    second = Trained(model, rule(random_steps=4), x_seq[3:], target[3:], state=first.result.state, chunk=3)
    same({n: first.gradients[n] + second.gradients[n] for n in whole.gradients}, whole.gradients)


class StartsFromItsInput(nn.Module):
    """The potential before the first step is a function of the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = torch.full_like(x, 0.3)
        u = 0.7 * self.v + x
        spike = TriangleSpike.apply(u - 1)
        self.v = u - spike.detach()
        return spike


def test_the_first_step_may_start_from_an_expression() -> None:
    model = StartsFromItsInput()
    x_seq, target = sequences(4, 5)
    same(
        Trained(model, SLTT_K(len(x_seq)), x_seq, target, chunk=2).gradients,
        sltt(model, x_seq, target, mse, 1 / len(x_seq)).gradients,
    )


class ExplicitState(nn.Module):
    """State that goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.fc(x)
        mem = x if mem is None else 0.7 * mem + x
        spike = TriangleSpike.apply(mem - 1)
        return spike, mem - spike.detach()


class HiddenState(ExplicitState):
    """The same with the state kept inside."""

    mem: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        spike, self.mem = super().forward(x, self.mem)
        return spike


def test_state_may_be_an_argument() -> None:
    explicit, hidden = ExplicitState(), HiddenState()
    hidden.load_state_dict(explicit.state_dict())
    x_seq, target = sequences(4, 5)
    expected = sltt(hidden, x_seq, target, mse, 1 / len(x_seq)).gradients
    for chunk in (3, None):
        same(Trained(explicit, SLTT_K(len(x_seq)), x_seq, target, chunk=chunk).gradients, expected)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps of each run of a net from now on."""
    lengths: list[int] = []

    def counting(execution: Execution, leaves: Any, given: Any, state: Any, record: Any, steps: int) -> Any:
        lengths.append(steps)
        return run_sequence(execution, leaves, given, state, record, steps)

    run_sequence = Execution.run_sequence
    monkeypatch.setattr(Execution, "run_sequence", counting)
    return lengths


@each_case
def test_each_chunk_is_run_once_and_the_chosen_steps_together(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x_seq, target, _ = prepared(case)
    lengths = count_runs(monkeypatch)
    Trained(model, SLTT_K(2), x_seq, target, chunk=5)
    assert sum(lengths) == len(x_seq) + 2
    assert lengths in ([5, 2, 2], [5, 1, 2, 1])  # as the chosen steps are in one chunk or two


def test_what_is_held_for_backward_is_bounded_by_the_chunk() -> None:
    held = [peak_saved_bytes(leaky_net(), SLTT_K(20), T, chunk=8) for T in (24, 240)]
    assert held[1] <= 1.1 * held[0]


def test_inputs_that_are_the_same_at_every_step_are_run_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.lif = nn.Linear(5, 4), nn.Linear(2, 4), PlainLIF(0.6)

        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            return self.lif(self.a(x) + self.b(image))

    model = TwoInputs()
    x_seq, target = sequences(4, 5)
    image = torch.rand(N, 2)
    net = snnfx.convert(model, time_dim=(-1, None))
    args: Any = (x_seq.movedim(0, -1), image)
    whole = Trained(net, SLTT, args, target)
    lengths = count_runs(monkeypatch)
    found = Trained(net, SLTT_K(len(x_seq)), args, target)
    assert sorted(lengths) == [1, 2, 2, 2, 7]
    same(found.gradients, whole.gradients)
