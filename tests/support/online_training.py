"""Training runs of online rules that several tests share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from snnfx.online import Rule, StepResult, Trainer
from support.online_models import LEAKS, Graph, N, T, dense_net, sgd
from support.online_oracles import (
    PlainLIF,
    mse,
)


class Trained:
    """A copy of the model after one call of a trainer: gradients of the last update, parameters, the result."""

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        x_seq: Tensor,
        target: Tensor,
        loss: Callable[[Any, Any], Tensor] = mse,
        state: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.trainer = Trainer(self.model, rule, sgd(list(self.model.parameters())), loss, **options)
        self.result: StepResult = self.trainer.step(x_seq, target, state=state, return_outputs=True)
        self.gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()
        }
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        named = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=tolerance, msg=named)


class ZooNet(nn.Module):
    """Neurons of the zoo: hard and soft reset, the input divided by tau and not, a leaky readout at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.lif1 = snnfx.neuron.LIFNode(tau=2.0, v_threshold=0.6)
        self.lif2 = snnfx.neuron.LIFNode(tau=4.0, decay_input=False, v_reset=None, detach_reset=True)
        self.readout = snnfx.neuron.LeakyIntegrator(tau=3.0)
        nn.init.normal_(self.fc1.weight, 0.4, 0.6)
        nn.init.normal_(self.fc2.weight, 0.2, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.fc3(self.lif2(self.fc2(self.lif1(self.fc1(x))))))


Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, float]]

CASES: dict[str, Case] = {
    "plain": (lambda: dense_net((0.5, 0.7, 0.6)), (5,), {"2": 0.7, "4": 0.6}),
    "graph": (Graph, (1, 8, 8), LEAKS),
    "zoo": (ZooNet, (5,), {"fc2": 0.75, "fc3": 1 - 1 / 3}),
}

each_case = pytest.mark.parametrize("case", CASES)


def prepared(case: str) -> tuple[nn.Module, Tensor, Tensor, dict[str, float]]:
    make, shape, leaks = CASES[case]
    model = make()
    x_seq = (torch.rand(T, N, *shape) < 0.5).double()
    with torch.no_grad():
        out = copy.deepcopy(model)(x_seq[0]).shape[-1]
    return model, x_seq, torch.rand(T, N, out), leaks


def batch_norm_net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), PlainLIF(0.6, 0.5), nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), PlainLIF(0.6, 0.5),
        nn.Flatten(), nn.Linear(4, 3), PlainLIF(0.6, 0.5),
    )  # fmt: skip
    nn.init.normal_(model[8].weight, 0.5, 0.5)
    return model


def refused(model: nn.Module, code: str, call: Callable[[], Any]) -> InputError:
    """The error of a call that leaves the weights and their gradients as they were."""
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=code) as caught:
        call()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    return caught.value
