"""The functions that online rules put into a graph: values, gradients, and that they fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snnfx.ops.online_functions import (
    cut_history,
    draw_dropout_mask,
    ones_per_sample,
    traced_call,
    traced_module,
    update_trace,
)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


T, N = 4, 3


def folded(function: Callable[..., Tensor], *sequences: Tensor) -> None:
    """All steps in one batch give what the steps give one after the other."""
    at_once = function(*(x.flatten(0, 1) for x in sequences)).unflatten(0, (T, -1))
    singly = torch.stack([function(*step) for step in zip(*sequences, strict=True)])
    torch.testing.assert_close(at_once, singly, atol=1e-15, rtol=0)


def test_a_state_without_history_has_its_value() -> None:
    x = torch.rand(T, N, 2, requires_grad=True)
    assert not cut_history(x).requires_grad and torch.equal(cut_history(x), x)
    assert cut_history(0.5) == 0.5
    folded(cut_history, x.detach())


def test_a_trace_is_what_is_left_of_it_and_the_operand() -> None:
    a, x = torch.rand(T, N, 2), torch.rand(T, N, 2, requires_grad=True)
    torch.testing.assert_close(update_trace(a, x, 0.75), (0.75 * a + x).detach(), atol=1e-15, rtol=0)
    assert not update_trace(a, x, 0.75).requires_grad
    assert torch.equal(update_trace(0.0, x, 0.75), x) and torch.equal(update_trace(2.0, x, 0.5), x + 1)
    folded(lambda a, x: update_trace(a, x, 0.75), a, x.detach())


def test_a_trace_of_half_precision_is_kept_in_single() -> None:
    assert update_trace(0.0, torch.ones(2, dtype=torch.bfloat16), 0.9).dtype == torch.float32


def test_the_operand_of_a_bias_is_one_for_each_sample() -> None:
    folded(ones_per_sample, torch.rand(T, N, 5, 2))


@pytest.mark.parametrize("name", ["dropout", "dropout2d"])
def test_a_dropout_mask_has_the_shape_of_the_operand(name: str) -> None:
    mask = draw_dropout_mask(0.5, torch.rand(40, 30, 2, 2), name)
    assert set(mask.unique().tolist()) == {0.0, 2.0} and 0.9 < float(mask.mean()) < 1.1
    assert (bool((mask == mask[..., :1, :1]).all())) == (name == "dropout2d")
    assert draw_dropout_mask(nn.Dropout(0.0), torch.rand(2, 3), "dropout").eq(1).all()


class Doubled(nn.Linear):
    """A layer with a forward of its own: no closed form is known for it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), (4,)),
    "linear on positions": (lambda: nn.Linear(4, 5, bias=False), (2, 4)),
    "a forward of its own": (lambda: Doubled(4, 5), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (4, 7, 7)),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)), (4, 7, 7)),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (4, 5, 5)),
}


def expected_gradients(call: Callable[[Tensor], Tensor], operand: Tensor, trace: Tensor, weight: Tensor) -> Any:
    """Value and operand gradient at the operand, weight gradient at the trace; with the gradient that arrives."""
    value = call(operand)
    arriving = torch.rand_like(value)
    (on_operand,) = torch.autograd.grad(value, operand, arriving)
    (on_weight,) = torch.autograd.grad(call(trace), weight, arriving)
    return value, arriving, on_operand, on_weight


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("hooked", [False, True])
def test_a_traced_module_has_the_weight_gradient_of_the_trace(name: str, hooked: bool) -> None:
    make, shape = MODULES[name]
    module = make()
    operand, trace = torch.rand(N, *shape, requires_grad=True), torch.rand(N, *shape)
    value, arriving, on_operand, on_weight = expected_gradients(module, operand, trace, module.weight)
    calls: list[int] = []
    if hooked:
        module.register_forward_hook(lambda *_: calls.append(1))
    found = traced_module(module, operand, trace)
    torch.testing.assert_close(found, value, atol=1e-12, rtol=0)
    module.zero_grad()
    found.backward(arriving)
    torch.testing.assert_close(operand.grad, on_operand, atol=1e-12, rtol=0)
    torch.testing.assert_close(module.weight.grad, on_weight, atol=1e-12, rtol=0)
    if module.bias is not None:
        dims = [d for d in range(found.dim()) if d != (1 if found.dim() > 2 and len(shape) > 1 else found.dim() - 1)]
        torch.testing.assert_close(module.bias.grad, arriving.sum(dims), atol=1e-12, rtol=0)
    assert bool(calls) == hooked


@pytest.mark.parametrize("name", MODULES)
def test_a_traced_module_under_vmap_is_the_same(name: str) -> None:
    make, shape = MODULES[name]
    module = make()
    operand, trace = torch.rand(T, N, *shape, requires_grad=True), torch.rand(T, N, *shape)
    gradients = []
    for call in (
        lambda: torch.vmap(lambda x, a: traced_module(module, x, a))(operand, trace),
        lambda: torch.stack([traced_module(module, x, a) for x, a in zip(operand, trace, strict=True)]),
    ):
        y = call()
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        gradients.append(torch.autograd.grad((y * weights).sum(), [operand, module.weight]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=0)


FUNCTIONS: dict[str, tuple[str, int, Callable[[Tensor, Tensor], tuple[Any, ...]], dict[str, Any]]] = {
    "linear": ("linear", 0, lambda x, w: (x, w), {}),
    "conv2d": ("conv2d", 0, lambda x, w: (x.view(N, 4, 1, 1), w.view(4, 4, 1, 1)), {"padding": 1}),
    "matmul": ("matmul", 0, lambda x, w: (x, w), {}),
    "matmul from the left": ("matmul", 1, lambda x, w: (w, x.t()), {}),
    "mm": ("mm", 0, lambda x, w: (x, w), {}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_traced_function_has_the_weight_gradient_of_the_trace(name: str) -> None:
    target, position, arguments, options = FUNCTIONS[name]
    operand, trace, weight = torch.rand(N, 4, requires_grad=True), torch.rand(N, 4), nn.Parameter(torch.rand(4, 4))
    function = getattr(F, target, None) or getattr(torch, target)

    def call(x: Tensor) -> Tensor:
        return function(*arguments(x, weight), **options)

    value, arriving, on_operand, on_weight = expected_gradients(call, operand, trace, weight)
    found = traced_call(
        target, position, arguments(trace, weight)[position], None, *arguments(operand, weight), **options
    )
    torch.testing.assert_close(found, value, atol=1e-12, rtol=0)
    found.backward(arriving)
    torch.testing.assert_close(operand.grad, on_operand, atol=1e-12, rtol=0)
    torch.testing.assert_close(weight.grad, on_weight, atol=1e-12, rtol=0)


def test_a_traced_layer_under_autocast_has_gradients_in_its_own_type() -> None:
    torch.set_default_dtype(torch.float32)
    for module, shape in ((nn.Linear(4, 5), (4,)), (nn.Conv2d(4, 5, 3, padding=1), (4, 6, 6))):
        operand, trace = torch.rand(N, *shape, requires_grad=True), torch.rand(N, *shape)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = traced_module(module, operand, trace)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert module.weight.grad.dtype == operand.grad.dtype == torch.float32
        exact = torch.autograd.grad(module(trace).sum(), module.weight)[0]
        torch.testing.assert_close(module.weight.grad, exact, rtol=0.05, atol=0.05)
