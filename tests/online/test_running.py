"""What does not depend on how a rule is run: chunks, calls, memory, and what happens around an update."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnfx.online import BPTT, FPTT, OSTL, OTTT_A, OTTT_O, SLTT, SLTT_K, TBPTT, Rule, Trainer
from support.online_models import N, T, close, differ, sequences, sgd
from support.online_oracles import mse, ottt
from support.online_training import Trained, ZooNet, prepared, same


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


# How it is run makes no difference.


@pytest.mark.parametrize("rule", [SLTT, OTTT_A, OTTT_O, FPTT(0.5), OSTL, BPTT], ids=lambda rule: rule.name)
def test_the_length_of_chunks_does_not_change_the_numbers(rule: Rule) -> None:
    model, x_seq, target, _ = prepared("zoo")
    whole = Trained(model, rule, x_seq, target, chunk=T)
    for chunk in (1, 2, 3, T + 5):
        part = Trained(model, rule, x_seq, target, chunk=chunk)
        same(part.parameters, whole.parameters)
        same(part.gradients, whole.gradients)
        close(part.result.outputs, whole.result.outputs)
        same(part.result.state, whole.result.state)


@pytest.mark.parametrize("rule", [SLTT, OTTT_A, TBPTT(4)], ids=lambda rule: rule.name)
def test_a_sequence_in_two_calls_has_the_gradients_of_one(rule: Rule) -> None:
    model, x_seq, target, _ = prepared("zoo")
    rule = rule(loss_scale="sum")
    whole = Trained(model, rule, x_seq, target)
    first = Trained(model, rule, x_seq[:4], target[:4])
    second = Trained(model, rule, x_seq[4:], target[4:], state=first.result.state)
    same({n: first.gradients[n] + second.gradients[n] for n in whole.gradients}, whole.gradients)
    same(second.result.state, whole.result.state)
    close(torch.cat([first.result.outputs, second.result.outputs]), whole.result.outputs)


class SavedBytes:
    """Counts the bytes that autograd holds for backward passes, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        counter, size = self, tensor.numel() * tensor.element_size()
        counter.now += size
        counter.most = max(counter.most, counter.now)

        class Held:
            value = tensor.detach()

            def __del__(self) -> None:
                counter.now -= size

        return Held()


def peak_saved_bytes(rule: Rule, T: int, **options: Any) -> int:
    torch.manual_seed(0)
    model = ZooNet()
    trainer = Trainer(model, rule, sgd(list(model.parameters())), mse, **options)
    x_seq, target = torch.rand(T, N, 5), torch.rand(T, N, 4)
    trainer.step(x_seq[:20], target[:20])
    held = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda packed: packed.value):
        trainer.step(x_seq, target)
    return held.most


@pytest.mark.parametrize("rule", [SLTT, OTTT_A, OTTT_O, FPTT(0.5), OSTL], ids=lambda rule: rule.name)
def test_what_is_held_for_backward_does_not_grow_with_the_sequence(rule: Rule) -> None:
    assert peak_saved_bytes(rule, 240, chunk=8) <= 1.1 * peak_saved_bytes(rule, 24, chunk=8)


def test_what_bptt_holds_grows_with_the_sequence() -> None:
    assert peak_saved_bytes(BPTT, 240) > 5 * peak_saved_bytes(BPTT, 24)


# Around the update.


def test_gradients_of_several_calls_are_averaged() -> None:
    model, x_seq, target, leaks = prepared("plain")
    other_x, other_target = sequences(3, 5)
    clone = copy.deepcopy(model)
    trainer = Trainer(clone, OTTT_A, sgd(list(clone.parameters())), mse, accumulate=2)
    assert trainer.step(x_seq, target).updates == 0
    same({n: p.detach() for n, p in clone.named_parameters()}, {n: p.detach() for n, p in model.named_parameters()})
    assert trainer.step(other_x, other_target).updates == 1
    first = ottt(model, x_seq, target, mse, leaks, 1 / T).gradients
    second = ottt(model, other_x, other_target, mse, leaks, 1 / T).gradients
    expected = {n: p.detach() - 0.1 * (first[n] + second[n]) / 2 for n, p in model.named_parameters()}
    same({n: p.detach() for n, p in clone.named_parameters()}, expected)


def test_a_scheduler_between_calls_sets_the_rate_of_the_next_update() -> None:
    model, x_seq, target, leaks = prepared("plain")
    clone = copy.deepcopy(model)
    optimizer = sgd(list(clone.parameters()))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    trainer = Trainer(clone, OTTT_A, optimizer, mse)
    for rate in (0.1, 0.05):
        gradients = ottt(model, x_seq, target, mse, leaks, 1 / T).gradients
        trainer.step(x_seq, target)
        scheduler.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= rate * gradients[name]
    same({n: p.detach() for n, p in clone.named_parameters()}, {n: p.detach() for n, p in model.named_parameters()})


def test_gradients_are_clipped_by_their_norm() -> None:
    model, x_seq, target, leaks = prepared("plain")
    expected = ottt(model, x_seq, target, mse, leaks, 1 / T).gradients
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    found = Trained(model, OTTT_A, x_seq, target, clip_grad_norm=float(norm) / 3)
    assert found.result.grad_norm is not None
    close(found.result.grad_norm, norm, 1e-10)
    same(found.gradients, {n: g / 3 for n, g in expected.items()}, 1e-6)


@pytest.mark.parametrize("rule", [BPTT, OTTT_A, OTTT_O, SLTT_K(2), FPTT(0.5), FPTT(0.5, "authors"), OSTL], ids=str)
def test_frozen_parameters_are_left_alone_by_every_rule(rule: Rule) -> None:
    model, x_seq, target, _ = prepared("plain")
    model[2].weight.requires_grad_(False)
    unused = nn.Parameter(torch.rand(3))
    model.register_parameter("unused", unused)
    found = Trained(model, rule, x_seq, target)
    assert torch.equal(found.parameters["2.weight"], model[2].weight)
    assert differ(found.parameters["0.weight"], model[0].weight)
    assert torch.equal(found.parameters["unused"], unused)


def test_autocast_to_bfloat16_trains() -> None:
    torch.set_default_dtype(torch.float32)
    model = ZooNet().float()
    x_seq, target = torch.rand(T, N, 5), torch.rand(T, N, 4)
    found = Trained(model, OTTT_A, x_seq, target, amp_dtype=torch.bfloat16)
    exact = Trained(model, OTTT_A, x_seq, target)
    for name, gradient in exact.gradients.items():
        assert found.gradients[name].dtype == torch.float32
        assert (found.gradients[name] - gradient).norm() < 0.2 * gradient.norm()
    assert not torch.equal(found.gradients["fc1.weight"], exact.gradients["fc1.weight"])
