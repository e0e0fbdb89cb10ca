"""The loops of a model that runs over time itself are bound at their second call, and equal unbound ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError
from support.looped_models import Cell


class OverTime(nn.Module):
    """Mixes time, so that the call stays whole, between a loop over a sequence and one over a static input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.cell = nn.Linear(6, 5), nn.Linear(5, 4), Cell()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(5):
            s, v = self.cell(self.fc1(x[t]) * self.gain, v)
            out.append(s + 0.1 * v)
        y = torch.stack(out)
        static = 3 * self.fc2(y.softmax(0).mean(0))
        u, total = torch.zeros_like(static), torch.zeros_like(static)
        for _ in range(4):
            s, u = self.cell(static, u)
            total = total + s * self.gain + u
        return total


class Neurons(nn.Module):
    """Steps neurons of a library inside the loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif, self.out = nn.Linear(6, 6), neuron.LIFNode(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.lif.reset()
        y = torch.stack([self.lif(3 * self.fc(x[t])) for t in range(x.shape[0])])
        return self.out(y.cumsum(0).softmax(0))


def sequence(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def converted(model: nn.Module, x: Tensor) -> snnfx.Net:
    return snnfx.convert(copy.deepcopy(model), takes="sequence", example_inputs=(x,))


def results(module: nn.Module, x: Tensor) -> list[Any]:
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_equal(net: nn.Module, model: nn.Module, x: Tensor) -> None:
    for ours, theirs in zip(results(net, x), results(model, x), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def bound_loops(net: snnfx.Net) -> int:
    return sum(loop._bound_iterations._bound.is_filled for loop in net.loops)


@pytest.mark.parametrize("training", [True, False])
def test_loops_over_sequences_and_static_inputs(training: bool) -> None:
    model = OverTime().double().train(training)
    net = converted(model, sequence(5, 3, 6)).train(training)
    for x in (sequence(5, 3, 6), sequence(5, 2, 6)):
        for _ in range(4):
            assert_equal(net, model, x)
            with torch.no_grad():
                torch.testing.assert_close(net(x), model(x), rtol=1e-9, atol=1e-11)
    assert bound_loops(net) == len(net.loops) == 2


def test_parameters_may_be_frozen_changed_and_replaced_between_calls() -> None:
    model, x = OverTime().double(), sequence(5, 3, 6)
    net = converted(model, x)
    assert_equal(net, model, x)
    assert_equal(net, model, x)
    assert bound_loops(net) == 2
    for module in (net, model):
        module.gain.requires_grad_(False)
    assert_equal(net, model, x)
    for module in (net, model):
        module.fc1.requires_grad_(False)
        module.gain.requires_grad_()
    assert_equal(net, model, x)
    with torch.no_grad():
        for module in (net, model):
            module.gain.mul_(0.5)
    assert_equal(net, model, x)
    for module in (net, model):
        module.gain = nn.Parameter(torch.full((4,), 0.7, dtype=torch.float64)[:1])
    assert_equal(net, model, x)


def test_another_dtype_is_bound_anew() -> None:
    model, x = OverTime().double(), sequence(5, 3, 6)
    net = converted(model, x)
    assert_equal(net, model, x)
    assert_equal(net, model, x)
    model, net = model.float(), net.float()
    for _ in range(3):
        torch.testing.assert_close(net(x.float()), model(x.float()))


def test_settings_of_neurons_and_hooks_apply_at_the_next_call() -> None:
    model, x = Neurons().double(), sequence(5, 3, 6)
    net = converted(model, x)
    for _ in range(3):
        assert_equal(net, model, x)
    assert bound_loops(net) == len(net.loops)
    for module in (net, model):
        module.lif.v_threshold = 0.4
    assert_equal(net, model, x)
    called: list[int] = []
    net.fc.register_forward_hook(lambda *_: called.append(1))
    assert_equal(net, model, x)
    assert called


def test_copies_bind_their_own_modules() -> None:
    model, x = OverTime().double(), sequence(5, 3, 6)
    net = converted(model, x)
    assert_equal(net, model, x)
    assert_equal(net, model, x)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        clone.gain.zero_()
    for _ in range(3):
        assert_equal(net, model, x)
        assert not torch.equal(clone(x), net(x))


def test_gradients_of_gradients_are_refused_alike_in_each_call() -> None:
    model, x = OverTime().double(), sequence(5, 3, 6).requires_grad_()
    net = converted(model, x.detach())
    for _ in range(3):
        with pytest.raises(InputError, match="SNNFX316"):
            torch.autograd.grad(net(x).sum(), x, create_graph=True)


def test_transforms_run_unbound() -> None:
    model, x = Neurons().double().eval(), sequence(5, 3, 6)
    net = converted(model, x).eval()
    with torch.no_grad():
        net(x), net(x)
        stacked = torch.stack([x, 2 * x])
        torch.testing.assert_close(torch.vmap(net)(stacked), torch.stack([model(y) for y in stacked]))
