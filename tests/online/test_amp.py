"""Autocast: the numbers are those of stepping under autocast, whatever is looked at on fake tensors in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.online import BPTT, FPTT, OSTL, OTTT_A, OTTT_O, SLTT, SLTT_K, TBPTT, EProp, Rule, Trainer
from support.online_models import sgd
from support.online_oracles import PlainLIF, PlainReadout, detach_state

T, N = 5, 3


@pytest.fixture(autouse=True)
def _single() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


def convolutional() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        PlainLIF(0.5, 0.3),
        nn.Flatten(),
        nn.Linear(64, 3),
        PlainReadout(0.5),
    )
    nn.init.normal_(model[4].weight, 0.0, 0.1)
    return model


def sequences() -> tuple[Tensor, Tensor]:
    return torch.rand(T, N, 1, 6, 6), torch.rand(T, N, 3)


def loss(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y.float(), target)


def stepped(model: nn.Module, x_seq: Tensor, target: Tensor, cut: bool) -> dict[str, Tensor]:
    """Gradients of stepping under autocast, with the state cut at every step or never."""
    model, total = copy.deepcopy(model), torch.zeros(())
    for x, wanted in zip(x_seq, target, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(x), wanted) / T
        if cut:
            value.backward()
            detach_state(model)
        else:
            total = total + value
    if not cut:
        total.backward()
    return {n: p.grad for n, p in model.named_parameters()}  # type: ignore[misc]


def trained(model: nn.Module, rule: Rule, x_seq: Tensor, target: Tensor, **options: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    Trainer(model, rule, sgd(list(model.parameters())), loss, amp_dtype=torch.bfloat16, **options).step(x_seq, target)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32 and type(gradient) is Tensor
        assert float((gradient - expected[name]).norm()) <= 0.1 * float(expected[name].norm()) + 1e-3, name


@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("rule", [BPTT, SLTT, SLTT_K(T)], ids=lambda rule: rule.name)
def test_gradients_are_those_of_stepping(rule: Rule, chunk: int | None) -> None:
    model = convolutional()
    x_seq, target = sequences()
    near(trained(model, rule, x_seq, target, chunk=chunk), stepped(model, x_seq, target, cut=rule is not BPTT))


@pytest.mark.parametrize("rule", [TBPTT(2), OTTT_A, OTTT_O, FPTT(0.5), EProp, OSTL], ids=lambda rule: rule.name)
def test_every_rule_has_gradients_near_those_of_single_precision(rule: Rule) -> None:
    model = convolutional()
    x_seq, target = sequences()
    x_seq = (x_seq * 4).round() / 4  # exact in bfloat16
    single = copy.deepcopy(model)
    Trainer(single, rule, sgd(list(single.parameters())), loss, chunk=2).step(x_seq, target)
    for name, gradient in trained(model, rule, x_seq, target, chunk=2).items():
        expected = dict(single.named_parameters())[name].grad
        assert expected is not None and bool(gradient.isfinite().all())
        assert float((gradient - expected).norm()) <= 0.5 * float(expected.norm()) + 1e-2, name


def test_autocast_of_the_caller_is_the_same_as_asking_for_it() -> None:
    model = convolutional()
    x_seq, target = sequences()
    for rule in (BPTT, SLTT_K(T), OSTL):
        expected = trained(model, rule, x_seq, target, chunk=2)
        other = copy.deepcopy(model)
        trainer = Trainer(other, rule, sgd(list(other.parameters())), loss, chunk=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            trainer.step(x_seq, target)
        near({n: p.grad for n, p in other.named_parameters()}, expected)  # type: ignore[misc]


def test_a_net_converted_under_autocast_computes_with_real_weights() -> None:
    model = convolutional().eval()
    x_seq, _ = sequences()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        net = snnfx.convert(model, example_inputs=x_seq[0])
        y_seq = net(x_seq)
        expected = torch.stack([model(x) for x in x_seq])
    assert type(y_seq) is Tensor
    assert float((y_seq - expected).abs().mean()) < 0.02  # a rounding may let one neuron fire


def test_a_state_given_under_autocast_is_checked_without_fake_weights() -> None:
    model = convolutional().eval()
    x_seq, _ = sequences()
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = net.run(x_seq[:2])
        second, _ = net.run(x_seq[2:], state=state)
        expected = net(x_seq)
    assert type(second) is Tensor
    assert float((torch.cat([first, second]) - expected).abs().mean()) < 0.02
