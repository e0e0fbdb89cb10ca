"""Rules that run time steps twice update the buffers that the steps change only once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snnfx.functional import reset_net
from snnfx.neuron import LeakyIntegrator, LIFNode
from snnfx.online import BPTT, FPTT, OSTL, OTTT_O, SLTT, SLTT_K, TBPTT, EProp, Trainer
from support.stepping import assert_same

T, N, C = 6, 3, 4
RULES = [BPTT, TBPTT(2), OTTT_O, SLTT, SLTT_K(2), FPTT(0.5), EProp, OSTL]


class Adaptive(nn.Module):
    """Counts spikes in a buffer, by assignment or in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.lif, self.readout = nn.Linear(C, C), LIFNode(tau=2.0, v_threshold=0.4), LeakyIntegrator(tau=2.0)
        self.in_place = in_place
        self.register_buffer("rate", torch.zeros(C))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.lif(self.fc(x))
        if self.in_place:
            with torch.no_grad():
                self.rate.mul_(0.9).add_(0.1 * z.mean(0))
        else:
            self.rate = 0.9 * self.rate + 0.1 * z.detach().mean(0)
        return self.readout(z * (1 + self.rate.clone()))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("in_place", [False, True], ids=["assigned", "in place"])
def test_a_rule_updates_a_changed_buffer_once(rule: Any, chunk: int | None, in_place: bool) -> None:
    model = Adaptive(in_place)
    stepped = copy.deepcopy(model)
    x_seq, target = torch.rand(T, N, C, dtype=torch.float64) * 2, torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, rule, optimizer, F.cross_entropy, target_dim=None, chunk=chunk)
    for _ in range(2):
        trainer.step(x_seq, target)
        reset_net(stepped)
        stepped.zero_grad()
        losses = [F.cross_entropy(stepped(x), target) for x in x_seq]
    assert_same(model.rate, stepped.rate.detach())
    if rule is BPTT:
        torch.stack(losses).mean().backward()
        assert_same(model.fc.weight.grad, stepped.fc.weight.grad)
