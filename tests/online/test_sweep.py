"""Gradients through time in the memory of a chunk: whatever `chunk` is, they are those of the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from snnfx.online import BPTT, TBPTT, EProp, Rule, Trainer
from support.online_models import T, close, dense_net, leaky_net, peak_saved_bytes, sequences, sgd
from support.online_oracles import PlainLIF, bptt, mse, truncated_bptt
from support.online_training import Trained, batch_norm_net, each_case, prepared, same


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def assert_same_runs(found: Trained, expected: Trained) -> None:
    same(found.gradients, expected.gradients)
    same(found.parameters, expected.parameters)
    same(found.result.state, expected.result.state)
    close(found.result.outputs, expected.result.outputs)
    close(found.result.loss, expected.result.loss)
    assert found.result.updates == expected.result.updates


@each_case
@pytest.mark.parametrize("chunk", [1, 3])
def test_bptt_in_chunks_is_bptt(case: str, chunk: int) -> None:
    model, x_seq, target, _ = prepared(case)
    found = Trained(model, BPTT, x_seq, target, chunk=chunk)
    expected = bptt(model, x_seq, target, mse, 1 / T)
    same(found.gradients, expected.gradients)
    close(found.result.outputs, expected.outputs)


def test_truncated_bptt_in_chunks_is_truncated_bptt() -> None:
    model, x_seq, target, _ = prepared("zoo")
    found = Trained(model, TBPTT(5), x_seq, target, chunk=2)
    same(found.gradients, truncated_bptt(model, x_seq, target, mse, 5, 1 / T).gradients)


def test_updates_within_a_sequence_end_a_stretch() -> None:
    model, x_seq, target, _ = prepared("plain")
    found = Trained(model, BPTT(update=4), x_seq, target, chunk=3)
    same(found.parameters, truncated_bptt(model, x_seq, target, mse, 4, 1 / T, make_optimizer=sgd).parameters)
    assert found.result.updates == 2


@pytest.mark.parametrize("chunk", [1, 3, T])
@pytest.mark.parametrize("rule", [EProp, EProp(cut=("0.v",), operand="raw")], ids=["e-prop", "one slot cut"])
def test_rules_that_keep_some_states_are_the_same_in_chunks(rule: Rule, chunk: int) -> None:
    model = leaky_net()
    x_seq, target = sequences(2, 4)
    assert_same_runs(Trained(model, rule, x_seq, target, chunk=chunk), Trained(model, rule, x_seq, target))


def test_a_sequence_goes_on_from_a_given_state() -> None:
    model = leaky_net()
    x_seq, target = sequences(2, 4)
    state = Trained(model, EProp, x_seq, target).result.state
    runs = [Trained(model, EProp, x_seq, target, state=state, chunk=chunk) for chunk in (2, None)]
    assert_same_runs(*runs)


def test_gradients_of_several_calls_are_averaged_and_clipped() -> None:
    x_seq, target = sequences(3, 5)
    model = dense_net((0.5, 0.7, 0.6))
    runs = [Trained(model, BPTT, x_seq, target, clip_grad_norm=1e-3, chunk=chunk) for chunk in (2, None)]
    assert_same_runs(*runs)
    accumulated = []
    for chunk in (2, None):
        run = Trained(model, BPTT, x_seq, target, accumulate=2, chunk=chunk)
        run.trainer.step(x_seq.flip(0), target)
        accumulated.append({n: p.grad for n, p in run.model.named_parameters()})
    same(*accumulated)


# What a second run must not change or see differently.


def test_running_statistics_move_once() -> None:
    model = batch_norm_net()
    x_seq, target = sequences(3, 1, 8, 8)
    found, whole = (Trained(model, BPTT, x_seq, target, chunk=chunk) for chunk in (2, None))
    assert_same_runs(found, whole)
    same(dict(found.model.named_buffers()), dict(whole.model.named_buffers()))


def test_a_power_iteration_is_repeated_from_where_it_began() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), PlainLIF(0.7))
    x_seq, target = sequences(4, 5)
    found, whole = (Trained(model, BPTT, x_seq, target, chunk=chunk) for chunk in (1, None))
    same(found.gradients, whole.gradients)
    same(dict(found.model.named_buffers()), dict(whole.model.named_buffers()))


@pytest.mark.parametrize("dropout", ["step", "sequence"])
def test_random_numbers_are_those_of_the_first_run(dropout: Any) -> None:
    # The output is linear in the last weight: its gradient times the weight is the sum of the outputs that were seen.
    model = nn.Sequential(nn.Linear(5, 6), PlainLIF(0.7), nn.Dropout(0.5), nn.Linear(6, 4, bias=False))
    nn.init.constant_(model[0].weight, 1.0)
    x_seq, target = sequences(4, 5)
    rule = BPTT(dropout=dropout, loss_scale="sum")
    run = Trained(model, rule, x_seq, target, lambda y, target: y.sum(), chunk=2)
    close((run.gradients["3.weight"] * model[3].weight).sum().detach(), run.result.outputs.sum())
    before = torch.get_rng_state()
    run.trainer.step(x_seq, target)
    assert not torch.equal(before, torch.get_rng_state())


# Memory.


@pytest.mark.parametrize("rule", [EProp, BPTT, TBPTT(60)], ids=lambda rule: rule.name)
def test_what_is_held_for_backward_does_not_grow_with_the_sequence(rule: Rule) -> None:
    assert peak_saved_bytes(leaky_net(), rule, 240, chunk=8) <= 1.1 * peak_saved_bytes(leaky_net(), rule, 24, chunk=8)


def test_eprop_is_run_in_chunks_without_being_asked_and_bptt_is_not() -> None:
    model = leaky_net()
    for rule, whole in ((EProp, False), (BPTT, True)):
        trainer = Trainer(model, rule, sgd(list(model.parameters())), mse)
        assert (trainer.chunk_length(1000, 2**20) == 1000) == whole
        assert trainer.chunk_length(1000, 16) == 1000
