"""An autograd.Function of parameters runs once for all time steps only if its backward is linear in the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.neuron import LIFNode
from support.stepping import assert_converts, assert_same, finish_run, fresh_copy, run_stepped

T, N, C = 5, 3, 6


def quantise(backward: Callable[[Tensor, Tensor], Any]) -> Any:
    class Quantise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return torch.round(w * 4) / 4

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return backward(grad, *ctx.saved_tensors)

    return Quantise.apply


def zero_outside(grad: Tensor, w: Tensor) -> Tensor:
    grad = grad.clone()
    grad[w.abs() > 0.5] = 0
    return grad


LINEAR = {
    "straight-through": lambda grad, w: grad,
    "masked": lambda grad, w: grad * (w.abs() <= 0.5),
    "masked in place": zero_outside,
    "scaled": lambda grad, w: grad * torch.cos(w) / 3,
}
NOT_LINEAR = {
    "clipped": lambda grad, w: grad.clamp(-0.1, 0.1),
    "clipped far away": lambda grad, w: grad.clamp(-100, 100),
    "sign": lambda grad, w: grad.sign(),
    "normalised": lambda grad, w: grad / (1 + grad.norm()),
    "penalty": lambda grad, w: grad + 0.01 * w,
}


class Quantised(nn.Module):
    def __init__(self, backward: Callable[[Tensor, Tensor], Any], inside_the_loop: bool = False) -> None:
        super().__init__()
        self.quantise, self.inside_the_loop = quantise(backward), inside_the_loop
        self.weight = nn.Parameter(torch.randn(C, C))
        self.lif = LIFNode(tau=2.0, v_threshold=0.4)
        self.z: Any = None

    def forward(self, x: Tensor) -> Tensor:
        w = self.quantise(self.weight * 1.5)
        if not self.inside_the_loop:
            return self.lif(F.linear(x, w))
        self.z = self.lif(F.linear(x if self.z is None else x + self.z, w))
        return self.z


def make(backward: Callable[[Tensor, Tensor], Any], inside_the_loop: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Quantised(backward, inside_the_loop).double(), torch.rand(T, N, C, dtype=torch.float64)


@pytest.mark.parametrize("inside_the_loop", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_backward_runs_once(name: str, inside_the_loop: bool) -> None:
    net = assert_converts(*make(LINEAR[name], inside_the_loop))
    assert net.regions[0].kind == "once"


@pytest.mark.parametrize("inside_the_loop", [False, True])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_backward_that_is_not_linear_runs_at_every_step(name: str, inside_the_loop: bool) -> None:
    net = assert_converts(*make(NOT_LINEAR[name], inside_the_loop))
    assert "its backward is not linear in the gradient" in " ".join(str(snnfx.explain(net)).split())


@pytest.mark.parametrize(("name", "kind"), [("scaled", "once"), ("clipped", "loop")])
def test_function_of_an_input_that_does_not_change_with_time(name: str, kind: str) -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantise, self.fc = quantise({**LINEAR, **NOT_LINEAR}[name]), nn.Linear(C, C)
            self.lif = LIFNode(tau=2.0, v_threshold=0.4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.quantise(self.fc(x)))

    torch.manual_seed(0)
    model, x = Encoded().double(), torch.rand(N, C, dtype=torch.float64)
    expected = run_stepped(model, x.expand(T, N, C))
    net = snnfx.convert(fresh_copy(model), time_dim=None, example_inputs=x)
    actual = finish_run(net, [], net(x, T=T))
    assert_same(actual.outputs, expected.outputs)
    assert_same(actual.parameter_grads, expected.parameter_grads)
    functions = [region for region in net.regions if "apply_autograd_function" in map(str, region.nodes)]
    assert [region.kind for region in functions] == [kind]


def test_conversion_leaves_the_gradients_and_the_random_numbers_alone() -> None:
    model, _ = make(lambda grad, w: grad.sign())
    state = torch.get_rng_state()
    snnfx.convert(model)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_function_without_a_backward_is_converted() -> None:
    def backward(grad: Tensor, w: Tensor) -> Any:
        raise NotImplementedError("no backward")

    model, x_seq = make(backward)
    with torch.no_grad():
        torch.testing.assert_close(snnfx.convert(model)(x_seq).shape, x_seq.shape)
