"""Dense linear layers run in the library that was measured to be faster; values and gradients are those of torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import snnfx
from snnfx import neuron
from snnfx.lowering.choices import linear_layers
from snnfx.lowering.choices.linear_layers import (
    LIBRARIES,
    forget_linear_choices,
    gradients_by_one_dnn,
    latest_linear_choice,
    linear,
)
from snnfx.sandbox.torch_internals import has_one_dnn_linear
from support.stepping import step_model

pytestmark = pytest.mark.skipif(not has_one_dnn_linear(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def one_dnn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[int, ...]]]:
    """All products of plain float32 matrices run in oneDNN; their shapes are collected."""
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(LIBRARIES, "measure", lambda fixed, functions: "oneDNN")
    monkeypatch.setattr(linear_layers, "_LEAST_WORK", 1)
    shapes: list[tuple[int, ...]] = []
    compute = linear_layers.linear_by_one_dnn

    def recording(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append((x.shape[0], *weight.shape))
        return compute(x, weight, bias)

    monkeypatch.setattr(linear_layers, "linear_by_one_dnn", recording)
    forget_linear_choices()
    yield shapes
    forget_linear_choices()


def operands(*lead: int, inputs: int = 33, outputs: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*lead, inputs), torch.randn(outputs, inputs), torch.randn(outputs)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_values_and_gradients_are_those_of_torch(
    lead: tuple[int, ...], has_bias: bool, needs: tuple[bool, bool], one_dnn: list[tuple[int, ...]]
) -> None:
    x, weight, bias = operands(*lead)
    given = [x.requires_grad_(needs[0]), weight.requires_grad_(needs[1]), bias.requires_grad_(has_bias)]
    twins = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    y = linear(*given[:2], given[2] if has_bias else None)
    expected = functional.linear(*twins[:2], twins[2] if has_bias else None)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous()
    y.square().sum().backward()
    expected.square().sum().backward()
    for actual, twin in zip(given, twins, strict=True):
        assert (actual.grad is None) == (twin.grad is None)
        if twin.grad is not None:
            torch.testing.assert_close(actual.grad, twin.grad, rtol=1e-4, atol=1e-4)
    assert len(one_dnn) == 1 + sum(needs)


def test_gradients_with_gaps_and_expanded_gradients_are_read_as_they_are() -> None:
    x, weight, bias = operands(6)
    for reduce in (Tensor.sum, lambda y: (y.t() * torch.arange(6.0)).sum(), lambda y: y[:, ::2].sum()):
        given = [t.clone().requires_grad_() for t in (x, weight, bias)]
        twins = [t.clone().requires_grad_() for t in (x, weight, bias)]
        reduce(linear(*given)).backward()
        reduce(functional.linear(*twins)).backward()
        for actual, twin in zip(given, twins, strict=True):
            torch.testing.assert_close(actual.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_second_and_batched_gradients_are_those_of_torch() -> None:
    x, weight, bias = (t.requires_grad_() for t in operands(5))

    def of(function: object) -> list[Tensor]:
        y = function(x, weight, bias).tanh()  # type: ignore[operator]
        first = torch.autograd.grad(y.square().sum(), (x, weight, bias), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))
        y = function(x, weight, bias)  # type: ignore[operator]
        rows = torch.eye(y.numel())[:4].view(4, *y.shape)
        return [*first, *second, *torch.autograd.grad(y, (x, weight, bias), rows, is_grads_batched=True)]

    for actual, expected in zip(of(linear), of(functional.linear), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_changes_between_forward_and_backward_act_as_in_torch() -> None:
    for function in (linear, functional.linear):
        x, weight, bias = operands(5)
        weight.requires_grad_()
        y = function(x, weight, bias)
        with torch.no_grad():
            weight.add_(1.0)  # the gradient of the weight does not read it
        y.sum().backward()
        y = function(x.requires_grad_(), weight, bias)
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        x.grad, before = None, weight.detach().clone()
        y = function(x, weight, bias)
        weight.data = torch.zeros_like(weight)
        y.sum().backward()
        torch.testing.assert_close(x.grad, before.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_reach_the_result(value: float) -> None:
    x, weight, bias = operands(5)
    x[2, 3] = value
    y = linear(x, weight, bias)
    assert not y[2].isfinite().any() and y[:2].isfinite().all()


def test_other_operands_run_in_torch(one_dnn: list[tuple[int, ...]]) -> None:
    x, weight, bias = operands(6)
    gapped = torch.randn(6, 66)[:, ::2]
    for given in (
        (x.double(), weight.double(), bias.double()),
        (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        (gapped, weight, bias),
        (x[:1].expand(6, 33), weight, bias),
        (x, weight.t().contiguous().t(), bias),
        (x, weight[0], None),
        (x[:0], weight, bias),
    ):
        assert torch.equal(linear(*given), functional.linear(*given))
    for wrong in ((x[:, :5], weight, bias), (x, weight, bias[:3])):
        with pytest.raises(RuntimeError):
            linear(*wrong)
    assert not one_dnn


def test_settings_of_torch_are_obeyed(one_dnn: list[tuple[int, ...]]) -> None:
    x, weight, bias = operands(6)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, bias)
    torch.set_float32_matmul_precision("high")
    try:
        linear(x, weight, bias)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    try:
        linear(x, weight, bias)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not one_dnn
    linear(x, weight, bias)
    assert one_dnn


def test_pinned_choices_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_MEASURE", "0")
    x, weight, bias = (t.requires_grad_() for t in operands(6))
    assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    assert gradients_by_one_dnn(x, weight) == (False, False)


def test_each_product_is_measured_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[set[str]] = []

    def measure(fixed: str, functions: dict[str, object]) -> str:
        for function in functions.values():
            function()  # type: ignore[operator]
        measured.append(set(functions))
        return "torch"

    monkeypatch.setattr(LIBRARIES, "measure", measure)
    x, weight, bias = (t.requires_grad_() for t in operands(6))
    for _ in range(3):
        linear(x, weight, bias).sum().backward()
        with torch.no_grad():
            linear(x, weight, bias)
    assert len(measured) == 6  # three products, each until two measurements agree
    assert all(names == {"torch", "oneDNN"} for names in measured)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 256), nn.Linear(256, 64)
        self.lif = neuron.LIFNode(v_threshold=0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.lif(self.first(x)))
        return y


def test_a_net_uses_the_faster_library_and_explain_shows_it(one_dnn: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model, x_seq = Layers(), torch.randn(4, 8, 128)
    net, stepped = snnfx.convert(model, example_inputs=x_seq[0]), copy.deepcopy(model)
    for _ in range(4):
        model.zero_grad()
        y = net(x_seq)
        y.square().sum().backward()
    assert (32, 256, 128) in one_dnn
    expected = step_model(stepped, x_seq)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for actual, twin in zip(model.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, twin.grad, rtol=1e-3, atol=1e-3)
    choice = latest_linear_choice((256, 128))
    assert choice is not None and choice.name == "oneDNN"
    assert "Dense products run in oneDNN in `first` and `second` (measured)." in " ".join(
        str(snnfx.explain(net)).split()
    )


def test_autocast_and_transforms_run_in_torch(one_dnn: list[tuple[int, ...]]) -> None:
    model, x_seq = Layers(), torch.randn(4, 8, 128)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        for _ in range(3):
            net(x_seq)
        one_dnn.clear()
        with torch.autocast("cpu"):
            assert net(x_seq).dtype == torch.bfloat16
        torch.func.vmap(net)(torch.stack((x_seq, x_seq)))
    assert not one_dnn
