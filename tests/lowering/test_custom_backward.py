"""Loops whose backward pass depends on more than the forward pass does, through the backward of an autograd.Function.

The oracle is the user's model, stepped in a plain loop in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.step_lowering import StepLowering
from support.stepping import assert_same_run, fresh_copy, run_net, run_stepped

T, N, C = 6, 3, 8


def function(backward: Callable[..., Any]) -> Any:
    """A spike function `(v, operand) -> spikes` that ignores its operand; `backward(grad, v, operand)`."""

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor, operand: Tensor) -> Tensor:
            ctx.save_for_backward(v, operand)
            return (v >= 0).to(v)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return backward(grad, *ctx.saved_tensors)

    return Spike.apply


def slope(v: Tensor, width: Tensor | float = 2.0) -> Tensor:
    s = torch.sigmoid(v * width)
    return s * (1 - s)


class Neuron(snnfx.MemoryModule):
    """A leaky neuron whose surrogate has an operand; with `recurrent`, its spikes are an input of the next step."""

    def __init__(self, spike: Any, width: Tensor, recurrent: bool) -> None:
        super().__init__()
        self.spike, self.width = spike, nn.Parameter(width)
        self.back = nn.Linear(C, C, bias=False).double() if recurrent else None
        self.register_memory("v", 0.0)
        self.register_memory("z", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.back is not None:
            x = x + self.back(self.z + torch.zeros_like(x))
        v = self.v * 0.8 + x
        z = self.spike(v - 0.6, self.width)
        self.v = v * (1 - z)
        self.z = z + 0.3 * v
        return z + 0.1 * v


def lowered_steps(net: Any) -> list[Any]:
    return [r.kernels.in_use for r in net.region_modules().values() if getattr(r, "kernels", None) is not None]


def assert_steps(model: nn.Module, *sequences: Tensor, kind: type | None, **options: Any) -> Any:
    """The net equals the stepped model with kernels and without; with kernels, its loop is of this kind."""
    torch.manual_seed(1)
    expected = run_stepped(model, *sequences)
    assert_same_run(run_net(snnfx.convert(fresh_copy(model), lower=None, **options), *sequences), expected)
    net = snnfx.convert(fresh_copy(model), **options)
    assert_same_run(run_net(net, *sequences), expected)
    if kind is not None:
        assert kind in {type(step) for step in lowered_steps(net)}
    return net


@pytest.fixture
def x_seq() -> Tensor:
    return torch.randn(T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


KINDS = pytest.mark.parametrize(("recurrent", "kind"), [(False, LoweredStep), (True, MixedStep)])


@KINDS
@pytest.mark.parametrize("shape", [(), (1,), (C,), (1, C), (N, C)], ids=str)
def test_width_of_a_surrogate_is_learned(x_seq: Tensor, recurrent: bool, kind: type, shape: tuple[int, ...]) -> None:
    def backward(grad: Tensor, v: Tensor, width: Tensor) -> Any:
        return grad * slope(v, width) * width, (grad * slope(v, width) * v).sum_to_size(width.shape)

    width = torch.full(shape, 3.0, dtype=torch.float64)
    assert_steps(Neuron(function(backward), width, recurrent), x_seq, kind=kind)


@KINDS
def test_gradient_of_a_constant_that_no_call_reads(x_seq: Tensor, recurrent: bool, kind: type) -> None:
    spike = function(lambda grad, v, width: (grad * slope(v), (grad * v).sum(0)))
    assert_steps(Neuron(spike, torch.ones(C, dtype=torch.float64), recurrent), x_seq, kind=kind)


@KINDS
def test_only_the_constant_of_the_backward_pass_needs_a_gradient(x_seq: Tensor, recurrent: bool, kind: type) -> None:
    spike = function(lambda grad, v, width: (grad * slope(v), (grad * v * width).sum(0)))
    model = Neuron(spike, torch.ones(C, dtype=torch.float64), recurrent)
    net = snnfx.convert(fresh_copy(model))
    stepped = fresh_copy(model)
    torch.stack([stepped(x) for x in x_seq]).sum().backward()
    net(x_seq).sum().backward()
    torch.testing.assert_close(net.source.width.grad, stepped.width.grad)
    assert [type(step) for step in lowered_steps(net)] == [kind]


@KINDS
def test_net_is_trained_after_a_call_in_inference_mode(x_seq: Tensor, recurrent: bool, kind: type) -> None:
    spike = function(lambda grad, v, width: (grad * slope(v), (grad * v * width).sum(0)))
    model = Neuron(spike, torch.ones(C, dtype=torch.float64), recurrent)
    net = snnfx.convert(fresh_copy(model))
    with torch.inference_mode():
        net(x_seq)
    assert_same_run(run_net(net, x_seq), run_stepped(model, x_seq))
    assert [type(step) for step in lowered_steps(net)] == [kind]


@KINDS
def test_constant_is_trained_after_it_was_frozen(x_seq: Tensor, recurrent: bool, kind: type) -> None:
    spike = function(lambda grad, v, width: (grad * slope(v), (grad * v * width).sum(0)))
    model = Neuron(spike, torch.ones(C, dtype=torch.float64), recurrent)
    net = snnfx.convert(fresh_copy(model))
    net.source.width.requires_grad_(False)
    net(x_seq.clone().requires_grad_()).sum().backward()
    assert net.source.width.grad is None
    net.source.width.requires_grad_(True)
    assert_same_run(run_net(net, x_seq), run_stepped(model, x_seq))


@pytest.mark.parametrize("recurrent", [False, True])
def test_gradient_of_a_constant_that_does_not_depend_on_the_incoming_gradient(x_seq: Tensor, recurrent: bool) -> None:
    spike = function(lambda grad, v, width: (grad * slope(v), torch.full_like(width, 0.1) * width))
    kind = MixedStep if recurrent else LoweredStep
    assert_steps(Neuron(spike, torch.full((C,), 2.0, dtype=torch.float64), recurrent), x_seq, kind=kind)


@pytest.mark.parametrize("recurrent", [False, True])
def test_gradient_of_a_constant_that_depends_on_the_forward_pass_only(x_seq: Tensor, recurrent: bool) -> None:
    spike = function(lambda grad, v, width: (grad * slope(v), (v * v).sum(0)))
    assert_steps(Neuron(spike, torch.ones(C, dtype=torch.float64), recurrent), x_seq, kind=None)


NOT_LINEAR = {
    "clipped": lambda grad, v, width: (grad * v).sum(0).clamp(-0.5, 0.5),
    "sign": lambda grad, v, width: (grad * v).sum(0).sign(),
    "squared": lambda grad, v, width: (grad * v).sum(0) * (grad * v).sum(0),
    "plus a number": lambda grad, v, width: (grad * v).sum(0) + 1.0,
    "plus a penalty": lambda grad, v, width: (grad * v).sum(0) + 0.1 * width,
    "minus a penalty": lambda grad, v, width: 0.1 * width - (grad * v).sum(0),
    "normalised": lambda grad, v, width: (grad * v).sum(0) / (1 + (grad * v).sum(0).norm()),
    "divisor": lambda grad, v, width: width / (3.0 + (grad * v).sum(0).abs()),
}


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_gradient_of_a_constant_is_not_linear_in_the_incoming_gradient(
    x_seq: Tensor, recurrent: bool, name: str
) -> None:
    gradient = NOT_LINEAR[name]
    spike = function(lambda grad, v, width: (grad * slope(v), gradient(grad, v, width)))
    assert_steps(Neuron(spike, torch.full((C,), 2.0, dtype=torch.float64), recurrent), x_seq, kind=None)


@KINDS
def test_gradient_of_the_potential_is_clipped(x_seq: Tensor, recurrent: bool, kind: type) -> None:
    spike = function(lambda grad, v, width: ((grad * slope(v)).clamp(-0.1, 0.1), None))
    assert_steps(Neuron(spike, torch.ones((), dtype=torch.float64), recurrent), x_seq, kind=kind)


@KINDS
def test_linear_operations_on_the_gradient_of_a_constant_stay_in_a_kernel(
    x_seq: Tensor, recurrent: bool, kind: type
) -> None:
    def backward(grad: Tensor, v: Tensor, width: Tensor) -> Any:
        total = (grad * v).sum(0, keepdim=True).view(-1) * width / 3.0
        return grad * slope(v, width), -total

    assert_steps(Neuron(function(backward), torch.full((C,), 2.0, dtype=torch.float64), recurrent), x_seq, kind=kind)


def test_constant_has_an_autograd_graph_of_its_own(x_seq: Tensor) -> None:
    class Outer(Neuron):
        def __init__(self) -> None:
            spike = function(lambda grad, v, width: (grad * slope(v), (grad * v).sum(0)))
            super().__init__(spike, torch.ones(C, dtype=torch.float64), False)

        def forward(self, x: Tensor) -> Tensor:
            v = self.v * 0.8 + x
            z = self.spike(v - 0.6, self.width.exp() * 2)
            self.v = v * (1 - z)
            return z

    assert_steps(Outer(), x_seq, kind=LoweredStep)


class TwoStates(nn.Module):
    """The backward of the spike function reads a state that only the loop, not its output, depends on."""

    def __init__(self, spike: Any, recurrent: bool) -> None:
        super().__init__()
        self.spike = spike
        self.back = nn.Linear(C, C).double() if recurrent else None
        self.v: Any = None
        self.a: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.v = x if self.v is None else 0.8 * self.v + (x if self.back is None else x + self.back(self.v))
        self.a = x if self.a is None else 0.9 * self.a + 0.5 * x
        z = self.spike(self.v - 0.2, self.a)
        self.v = self.v - 0.2 * z
        return z


@KINDS
def test_backward_reads_a_state(x_seq: Tensor, recurrent: bool, kind: type) -> None:
    spike = function(lambda grad, v, a: (grad * torch.exp(-a.abs()), None))
    assert_steps(TwoStates(spike, recurrent), x_seq, kind=kind)


@KINDS
def test_state_has_a_gradient_through_the_backward_pass_only(x_seq: Tensor, recurrent: bool, kind: type) -> None:
    spike = function(lambda grad, v, a: (grad * slope(v), grad * v * 0.1))
    assert_steps(TwoStates(spike, recurrent), x_seq, kind=kind)


class TwoInputs(nn.Module):
    def __init__(self, spike: Any, recurrent: bool) -> None:
        super().__init__()
        self.spike = spike
        self.back = nn.Linear(C, C).double() if recurrent else None
        self.v: Any = None

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        self.v = x if self.v is None else 0.8 * self.v + (x if self.back is None else x + self.back(self.v))
        z = self.spike(self.v - 0.2, a)
        self.v = self.v - 0.2 * z
        return z


BACKWARDS = {
    "reads it": lambda grad, v, a: (grad * torch.exp(-a.abs()), None),
    "differentiates it": lambda grad, v, a: (grad * slope(v), (grad * v).sum_to_size(a.shape)),
    "both": lambda grad, v, a: (grad * torch.exp(-a.abs()), (grad * v * a).sum_to_size(a.shape)),
    "returns a constant": lambda grad, v, a: (grad * slope(v), torch.full_like(a, 0.1)),
}


@KINDS
@pytest.mark.parametrize("of_a_channel", [False, True])
@pytest.mark.parametrize("name", BACKWARDS)
def test_backward_depends_on_an_input_sequence(
    x_seq: Tensor, recurrent: bool, kind: type, of_a_channel: bool, name: str
) -> None:
    a_seq = torch.rand(T, *((1, C) if of_a_channel else (N, C)), dtype=torch.float64) + 0.5
    expected = None if name == "returns a constant" or of_a_channel else kind  # another net runs other batch sizes
    assert_steps(TwoInputs(function(BACKWARDS[name]), recurrent), x_seq, a_seq, kind=expected)


@pytest.mark.parametrize("recurrent", [False, True])
def test_gradient_of_a_constant_is_smaller_than_a_step(x_seq: Tensor, recurrent: bool) -> None:
    class Model(TwoInputs):
        def __init__(self) -> None:
            super().__init__(None, recurrent)
            self.width = nn.Parameter(torch.rand(C, dtype=torch.float64))

        def forward(self, x: Tensor, a: Tensor) -> Tensor:
            spike = function(lambda grad, v, w: (grad * slope(v), w))
            self.spike = lambda v, a: spike(v, self.width) + function(lambda grad, v, a: (grad, a.sin()))(v, a)
            return super().forward(x, a)

    a_seq = torch.rand(T, 1, C, dtype=torch.float64)
    assert_steps(Model(), x_seq, a_seq, kind=None)


def test_backward_reads_a_sequence_of_integers(x_seq: Tensor) -> None:
    spike = function(lambda grad, v, a: (grad * a.to(grad), None))
    a_seq = torch.randint(0, 3, (T, N, C))
    assert_steps(TwoInputs(spike, False), x_seq, a_seq, kind=None)


@pytest.mark.parametrize("options", [{"checkpoint": 2}, {"memory_budget": "1MB"}], ids=str)
@pytest.mark.parametrize("recurrent", [False, True])
def test_width_is_learned_with_recomputation(x_seq: Tensor, recurrent: bool, options: dict[str, Any]) -> None:
    def backward(grad: Tensor, v: Tensor, width: Tensor) -> Any:
        return grad * slope(v, width) * width, (grad * slope(v, width) * v).sum(0)

    model = nn.Sequential(
        nn.Linear(C, C).double(), Neuron(function(backward), torch.full((C,), 3.0, dtype=torch.float64), recurrent)
    )
    assert_steps(model, x_seq, kind=None, **options)


class WidthByItem(torch.autograd.Function):
    """A surrogate whose width is saved in a tensor and read by Python in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x, torch.tensor([width]))
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, others = ctx.saved_tensors
        width = others[0].item()
        return grad * (width - x.abs()).clamp(min=0) / width**2, None


class LearnedLeak(nn.Module):
    """The leak is a new tensor at each call: the sigmoid of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        leak, v, out = self.w.sigmoid(), torch.zeros_like(x[0]), []
        for x_t in x:
            v = leak * v + x_t
            s = WidthByItem.apply(v - 1, 1.0)
            v = v - s
            out.append(s)
        return torch.stack(out)


def test_only_the_constants_behind_a_number_that_python_reads_are_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    lower = StepLowering.lower
    monkeypatch.setattr(StepLowering, "lower", lambda *args: recorded.append(1) or lower(*args))
    x = 2 * torch.rand(5, 3, 4)
    net = snnfx.convert(LearnedLeak(), takes="sequence", example_inputs=(x,))
    net(x)
    first = len(recorded)
    for _ in range(3):
        net(x)
    assert 0 < first == len(recorded)
