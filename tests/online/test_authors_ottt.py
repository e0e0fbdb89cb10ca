"""`trace_leak="pre"` gives the numbers of OTTT's authors' code, written out in plain tensors in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snnfx.online import OTTT_A, OTTT_O, Trainer
from support.online_equations import authors_ottt, mse_slope
from support.online_models import N, T, close, dense_net, differ, equations_of
from support.online_oracles import mse

LEAKS = [(0.5, 0.7, 0.6), (0.9, 0.3), (0.6, 0.6, 0.6)]


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def readout_net(leaks: tuple[float, ...]) -> tuple[nn.Sequential, nn.Linear]:
    hidden = dense_net(leaks)
    return hidden, nn.Linear(hidden[-2].out_features, 2)


@pytest.mark.parametrize("leaks", LEAKS)
def test_ottt_a_with_the_leak_of_the_emitting_neuron_is_the_authors(leaks: tuple[float, ...]) -> None:
    hidden, readout = readout_net(leaks)
    x_seq, target = (torch.rand(T, N, 5) < 0.5).double(), torch.rand(T, N, 2)
    weights = (readout.weight.detach(), readout.bias.detach())
    expected = authors_ottt(equations_of(hidden), weights, x_seq, target, mse_slope)
    model = nn.Sequential(*hidden, readout)
    Trainer(model, OTTT_A(trace_leak="pre"), torch.optim.SGD(model.parameters(), lr=0.1), mse).step(x_seq, target)
    for layer in range(len(leaks) + 1):
        assert expected["weight gradients"][layer].any()
        close(model[2 * layer].weight.grad, expected["weight gradients"][layer])
        close(model[2 * layer].bias.grad, expected["bias gradients"][layer])


@pytest.mark.parametrize("leaks", LEAKS)
def test_ottt_o_with_the_leak_of_the_emitting_neuron_is_the_authors(leaks: tuple[float, ...]) -> None:
    hidden, readout = readout_net(leaks)
    x_seq, target = (torch.rand(T, N, 5) < 0.5).double(), torch.rand(T, N, 2)
    weights = (readout.weight.detach(), readout.bias.detach())
    expected = authors_ottt(equations_of(hidden), weights, x_seq, target, mse_slope, lr=0.1, momentum=0.9)
    model = nn.Sequential(*hidden, readout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Trainer(model, OTTT_O(trace_leak="pre"), optimizer, mse).step(x_seq, target)
    for layer in range(len(leaks) + 1):
        close(model[2 * layer].weight.detach(), expected["weights"][layer])
        close(model[2 * layer].bias.detach(), expected["biases"][layer])


def test_the_leak_of_the_fed_neuron_leaves_the_readout_without_a_trace() -> None:
    hidden, readout = readout_net((0.5, 0.7, 0.6))
    x_seq, target = (torch.rand(T, N, 5) < 0.5).double(), torch.rand(T, N, 2)
    weights = (readout.weight.detach(), readout.bias.detach())
    expected = authors_ottt(equations_of(hidden), weights, x_seq, target, mse_slope)["weight gradients"]
    model = nn.Sequential(*hidden, readout)
    Trainer(model, OTTT_A, torch.optim.SGD(model.parameters(), lr=0.1), mse).step(x_seq, target)
    assert differ(model[6].weight.grad, expected[3])
    close(model[0].weight.grad, expected[0])


def test_a_trainer_shows_the_weights_without_a_trace_and_the_reason() -> None:
    hidden, readout = readout_net((0.5, 0.5))
    model = nn.Sequential(*hidden, readout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainers = [Trainer(model, rule, optimizer, mse) for rule in (OTTT_A, OTTT_A(trace_leak="pre"))]
    assert repr(trainers[0]) == "Trainer(rule=OTTT-A, optimizer=SGD)"
    for trainer in trainers:
        trainer.step((torch.rand(T, N, 5) < 0.5).double(), torch.rand(T, N, 2))
    assert '  4: no trace: it feeds no neuron; trace_leak="pre" or a number gives it a trace' in repr(trainers[0])
    assert "  4: a trace with the leak of 3.v" in repr(trainers[1])
