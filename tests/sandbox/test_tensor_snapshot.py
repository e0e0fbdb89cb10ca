"""A tensor returns to its value, its gradient and its gradient flag; generators return to their states."""

import random

import numpy
import pytest
import torch
from torch import nn

from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.rng_states import rng_restorer
from snnfx.sandbox.tensor_snapshot import TensorSnapshot
from snnfx.sandbox.tensor_values import value_restorer


def _change_value(p):
    p.data.add_(1)


def _change_dtype(p):
    p.data = p.data.double()


def _change_shape(p):
    p.data = torch.zeros(5)


def _change_grad(p):
    p.grad = torch.ones_like(p)


def _drop_grad(p):
    p.grad = None


def _freeze(p):
    p.requires_grad_(False)


@pytest.mark.parametrize(
    "change", [_change_value, _change_dtype, _change_shape, _change_grad, _drop_grad, _freeze], ids=lambda f: f.__name__
)
def test_snapshot_restores_what_changed(change):
    p = nn.Parameter(torch.tensor([1.0, float("nan"), 3.0]))
    grad = p.grad = torch.zeros(3)
    expected = p.detach().clone()
    snapshot = TensorSnapshot(p)
    change(p)
    snapshot.restore()
    assert p.dtype == torch.float32
    assert torch.equal(p.detach().nan_to_num(9.0), expected.nan_to_num(9.0))
    assert p.grad is grad
    assert p.requires_grad


@pytest.mark.parametrize("restorer", [lambda p: TensorSnapshot(p).restore, value_restorer])
def test_restoring_keeps_an_autograd_graph_valid(restorer):
    p = nn.Parameter(torch.ones(2))
    restore = restorer(p)
    p.data.mul_(3)
    y = (p * p).sum()
    restore()
    y.backward()
    assert torch.equal(p.detach(), torch.ones(2))


def test_snapshot_of_a_meta_tensor_restores_its_flag():
    p = nn.Parameter(torch.ones(2, device="meta"))
    snapshot = TensorSnapshot(p)
    p.requires_grad_(False)
    snapshot.restore()
    assert p.requires_grad


def _draw():
    return torch.rand(1).item(), random.random(), numpy.random.rand()


def test_restorer_restores_all_generators():
    restore = rng_restorer()
    first = _draw()
    restore()
    assert _draw() == first


@pytest.mark.parametrize("modules", [0, 1, 2])
@pytest.mark.parametrize("rng", [True, False])
def test_isolated_run_draws_again_only_if_it_includes_generators(modules, rng):
    with isolated(*[nn.Identity() for _ in range(modules)], rng=rng):
        first = _draw()
    assert [a == b for a, b in zip(_draw(), first, strict=True)] == [rng] * 3


def test_isolated_run_restores_buffers_of_submodules():
    model = nn.Sequential(nn.BatchNorm1d(2))
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with isolated(model):
        model(torch.randn(4, 2))
        model[0].running_mean = torch.full((2,), 7.0)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
