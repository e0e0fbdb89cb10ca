"""Calls of a net during a backward pass, as `torch.utils.checkpoint` makes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snnfx
from snnfx.errors import InputError
from snnfx.functional import reset_net
from snnfx.neuron import LIFNode

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(8, 8), norm, LIFNode(tau=2.0, v_threshold=0.4)).double()


def sequence() -> Tensor:
    return torch.rand(6, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@REENTRANT
def test_net_without_carried_state_can_be_checkpointed(use_reentrant: bool) -> None:
    model = make_model().eval()
    net, reference = snnfx.convert(model), snnfx.convert(copy.deepcopy(model))
    x_seq, x_reference = sequence(), sequence()
    checkpoint(net, x_seq, use_reentrant=use_reentrant).sum().backward()
    reference(x_reference).sum().backward()
    torch.testing.assert_close(x_seq.grad, x_reference.grad)
    torch.testing.assert_close(net.get_parameter("0.weight").grad, reference.get_parameter("0.weight").grad)


@REENTRANT
def test_checkpoint_around_a_net_that_carries_state_is_refused(use_reentrant: bool) -> None:
    net = snnfx.convert(make_model(), carry_state=True)
    x_seq = sequence()
    net(x_seq)
    y_seq = checkpoint(net, x_seq, use_reentrant=use_reentrant)
    state = {name: value.clone() for name, value in net.carried_state.items()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    with pytest.raises(InputError, match=r"SNNFX320 a net that carries its state \(2.v\) was called during a backward"):
        y_seq.sum().backward()
    assert {k: v.tolist() for k, v in net.carried_state.items()} == {k: v.tolist() for k, v in state.items()}
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert all(p.grad is None for p in net.parameters())


@REENTRANT
def test_net_can_be_used_after_the_refusal(use_reentrant: bool) -> None:
    net = snnfx.convert(make_model().eval(), carry_state=True)
    expected = [net(sequence()).detach() for _ in range(2)]
    reset_net(net)
    y_seq = checkpoint(net, sequence(), use_reentrant=use_reentrant)
    with pytest.raises(InputError, match="SNNFX320"):
        y_seq.sum().backward()
    torch.testing.assert_close(y_seq.detach(), expected[0])
    y_seq = net(sequence())
    torch.testing.assert_close(y_seq.detach(), expected[1])
    y_seq.sum().backward()
    reset_net(net)
    torch.testing.assert_close(net(sequence()).detach(), expected[0])


@REENTRANT
def test_checkpoint_around_single_steps_of_a_net_is_refused(use_reentrant: bool) -> None:
    net = snnfx.convert(make_model().eval(), step_mode="s")
    y = checkpoint(net, sequence()[0], use_reentrant=use_reentrant)
    with pytest.raises(InputError, match="SNNFX320"):
        y.sum().backward()


@REENTRANT
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_net_without_state_carries_nothing(use_reentrant: bool, step_mode: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).double()
    net = snnfx.convert(model, carry_state=True, step_mode=step_mode)
    x = sequence() if step_mode == "m" else sequence()[0]
    checkpoint(net, x, use_reentrant=use_reentrant).sum().backward()
    assert model[0].weight.grad is not None


def test_single_steps_with_explicit_state_can_be_checkpointed() -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8).double()

        def forward(self, x: Tensor, v: Any = None) -> Any:
            v = self.fc(x) if v is None else 0.5 * v + self.fc(x)
            return torch.tanh(v), v

    model = Explicit()
    net, reference = snnfx.convert(model, step_mode="s"), copy.deepcopy(model)
    outputs = []
    for run in (lambda *a: checkpoint(net, *a, use_reentrant=False), reference):
        v, total = None, torch.zeros((), dtype=torch.float64)
        for x in sequence():
            y, v = run(x, v)
            total = total + y.sum()
        total.backward()
        outputs.append(total.detach())
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(model.fc.weight.grad, reference.fc.weight.grad)


def test_stream_that_carries_state_is_refused_in_a_backward_pass() -> None:
    net = snnfx.convert(make_model().eval(), carry_state=True)

    def run(x_seq: Tensor) -> Tensor:
        return torch.cat(list(net.stream(x_seq.split(2))))

    y_seq = checkpoint(run, sequence(), use_reentrant=False)
    with pytest.raises(InputError, match="SNNFX320"):
        y_seq.sum().backward()


@REENTRANT
def test_hint_of_the_refusal_works(use_reentrant: bool) -> None:
    model = make_model().eval()
    carrying = snnfx.convert(model, carry_state=True, checkpoint="regions")
    expected = [carrying(sequence()), carrying(sequence())]
    expected[1].sum().backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    net = snnfx.convert(model)
    y_seq, state = net.run(sequence())
    torch.testing.assert_close(y_seq, expected[0])
    state = {name: value.detach() for name, value in state.items()}
    if use_reentrant:
        y_seq = checkpoint(lambda x: net.run(x, state=state)[0], sequence(), use_reentrant=True)
    else:
        y_seq, state = checkpoint(net.run, sequence(), state=state, use_reentrant=False)
    torch.testing.assert_close(y_seq, expected[1])
    y_seq.sum().backward()
    torch.testing.assert_close(model[0].weight.grad, gradient)


def test_compiled_net_that_carries_state_is_refused() -> None:
    net = snnfx.convert(make_model().eval(), carry_state=True)
    compiled = torch.compile(net, backend="eager")
    for _ in range(3):
        compiled(sequence()).sum().backward()
    y_seq = checkpoint(compiled, sequence(), use_reentrant=False)
    with pytest.raises(InputError, match="SNNFX320"):
        y_seq.sum().backward()
