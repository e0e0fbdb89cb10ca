"""Linear layers with few rows read their weight where it lies: products, gradients and nets equal torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import snnfx
from snnfx.lowering.events import crossovers, few_rows_gradients, spike_readers
from snnfx.lowering.events.event_kernel import Refusal
from snnfx.lowering.events.few_rows import FewRowsOfBits, has_few_rows, product_of_few_rows
from snnfx.lowering.events.few_rows_gradients import gradient_of_input, gradient_of_weight
from snnfx.lowering.events.layer_decisions import latest_decision
from snnfx.lowering.events.spike_bits import Flattening, SpikeBits
from support.stepping import step_model

SHAPES = [(1, 128, 64), (3, 130, 70), (16, 2048, 256), (7, 1000, 10), (5, 33, 129), (63, 257, 40), (2, 64, 1)]
"""Rows, inputs, outputs."""


def spikes(rows: int, inputs: int, dtype: torch.dtype, kind: str) -> Tensor:
    """Rows with zeros: of ones, of other numbers too, of numbers with signs of zero, or without zeros."""
    numbers = torch.randn(rows, inputs, dtype=dtype)
    if kind == "dense":
        return numbers
    active = torch.rand(rows, inputs) < 0.2
    if kind == "numbers":
        return numbers * active
    return torch.where(active, 1.0, -0.0 if kind == "negative zeros" else 0.0).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-10 if actual.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ones", "numbers", "negative zeros", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_of_few_rows_equals_the_dense_one(shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    x, weight = spikes(rows, inputs, dtype, kind), torch.randn(outputs, inputs, dtype=dtype)
    for bias in (None, torch.randn(outputs, dtype=dtype)):
        y = product_of_few_rows(x, weight, bias)
        assert y is not None and y.dtype == dtype
        close(y, functional.linear(x.double(), weight.double(), None if bias is None else bias.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_is_not_finite_is_refused(dtype: torch.dtype, value: float) -> None:
    for row, column in ((0, 0), (69, 129), (64, 128), (33, 77)):
        weight = torch.randn(70, 130, dtype=dtype)
        weight[row, column] = value
        assert product_of_few_rows(torch.zeros(3, 130, dtype=dtype), weight, None) is None


def test_the_largest_and_smallest_numbers_are_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        weight = torch.full((8, 128), limits.max, dtype=dtype)
        weight[0] = limits.min
        weight[1] = limits.smallest_normal / 2
        assert product_of_few_rows(torch.zeros(1, 128, dtype=dtype), weight, None) is not None


@pytest.mark.parametrize("outputs", [10, 100, 300])
def test_the_number_of_threads_does_not_change_the_product(outputs: int) -> None:
    torch.manual_seed(0)
    x, weight = spikes(16, 4096, torch.float32, "ones"), torch.randn(outputs, 4096)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(product_of_few_rows(x, weight, None))
    finally:
        torch.set_num_threads(before)
    assert all(y is not None and torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_products_of_torch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    grad, x = torch.randn(rows, outputs, dtype=dtype), torch.randn(rows, inputs, dtype=dtype)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    close(gradient_of_weight(grad, x), grad.double().T @ x.double())
    close(gradient_of_input(grad, weight), grad.double() @ weight.double())


def test_numbers_that_are_not_finite_reach_the_gradients() -> None:
    grad, x, weight = torch.zeros(3, 70), torch.zeros(3, 130), torch.zeros(70, 130)
    x[1, 129] = weight[69, 129] = float("nan")
    assert gradient_of_weight(grad, x)[:, 129].isnan().all()
    assert gradient_of_input(grad, weight)[:, 129].isnan().all()


def test_bits_give_the_product_of_numbers() -> None:
    torch.manual_seed(0)
    x = spikes(6, 192, torch.float32, "ones").view(3, 2, 192)
    words = (x.reshape(-1, 64).to(torch.int64) << torch.arange(64)).sum(1)
    weight, bias = torch.randn(40, 192), torch.randn(40)
    call = FewRowsOfBits((3, 2, 192), weight)
    refusal, density, y = call(words, bias, 0.9)
    assert refusal == Refusal.NONE and density == pytest.approx(x.mean().item(), abs=0.05)
    close(y, functional.linear(x.double(), weight.double(), bias.double()).flatten(0, 1))
    assert call(words, bias, 0.0)[0] == Refusal.TOO_DENSE
    weight[5, 100] = float("inf")
    assert call(words, bias, 0.9)[0] == Refusal.WEIGHT


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 8), (9, 9)])
def test_flattened_bits_are_the_bits_of_flattened_numbers(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = (torch.rand(3, 2, 128, *size) < 0.3).float()
    words = (x.permute(0, 1, 3, 4, 2).reshape(-1, 64).to(torch.int64) << torch.arange(64)).sum(1)
    spikes = SpikeBits(words, tuple(x.shape), (0, 2, 3, 1), x.dtype)
    flat = Flattening(spikes)(spikes)
    assert flat.is_row_major and torch.equal(flat.numbers(), x.flatten(2))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers run by events up to a density of 0.4, and gradients in place."""
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(crossovers.REMEMBERED, "get", lambda *_: 0.4)
    monkeypatch.setattr(crossovers.REMEMBERED, "_known", {})
    monkeypatch.setattr(few_rows_gradients.GRADIENTS.remembered, "get", lambda *_: "in place")
    monkeypatch.setattr(few_rows_gradients.GRADIENTS.remembered, "_known", {})
    yield


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(v_threshold=0.4)


def made(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Linear, Tensor]:
    """A model with a large linear layer, and inputs for few rows."""
    torch.manual_seed(0)
    layer = nn.Linear(8192, 256)
    model = {
        "flatten": lambda: nn.Sequential(
            nn.Conv2d(3, 128, 3, padding=1), lif(), nn.MaxPool2d(2), nn.Flatten(), layer, lif()
        ),
        "vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 8192), lif(), layer, lif()),
    }[kind]()
    return model.to(dtype), layer, torch.rand(9, 1, 3, 16, 16, dtype=dtype) * 2


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("kind", ["flatten", "vectors"])
def test_a_net_reads_the_bits_of_few_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, x_seq = made(kind, torch.float32)
    net = snnfx.convert(model.eval(), example_inputs=x_seq[0])
    read: list[int] = []
    compute = spike_readers.FewRowsOfBits.__call__

    def recording(self: FewRowsOfBits, *args: object) -> tuple[int, float, Tensor]:
        read.append(self.rows)
        return compute(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(spike_readers.FewRowsOfBits, "__call__", recording)

    def check() -> None:
        with torch.no_grad():
            y, expected = net(x_seq), step_model(copy.deepcopy(model), x_seq)
        assert (y != expected).double().mean() < 5e-3  # rounding flips few spikes

    with torch.no_grad():
        for _ in range(4):
            net(x_seq)
    assert read and set(read) == {9}
    layer.weight.data.mul_(1.1)  # without a change of the version
    check()
    layer.weight.data = torch.randn(256, 8192) * 0.02
    check()
    with torch.no_grad():
        layer.weight[3, 5] = float("nan")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(
                net(x_seq)[..., 3], step_model(copy.deepcopy(model), x_seq)[..., 3], equal_nan=True
            )
    decision = latest_decision(layer.weight)
    assert decision is not None and not decision.is_finite and not decision.by_events


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("kind", ["flatten", "vectors"])
def test_gradients_of_few_rows_equal_those_of_stepping(kind: str) -> None:
    model, layer, x_seq = made(kind, torch.float64)
    net, stepped = snnfx.convert(model, example_inputs=x_seq[0]), copy.deepcopy(model)
    for _ in range(4):
        model.zero_grad()
        net(x_seq).square().sum().backward()
    step_model(stepped, x_seq).square().sum().backward()
    decision = latest_decision(layer.weight)
    assert decision is not None and decision.by_events
    for actual, expected in zip(model.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("measured")
def test_only_the_gradients_that_are_needed_are_computed() -> None:
    model, layer, x_seq = made("vectors", torch.float64)
    layer.weight.requires_grad_(False)
    net, stepped = snnfx.convert(model, example_inputs=x_seq[0]), copy.deepcopy(model)
    net(x_seq).square().sum().backward()
    step_model(stepped, x_seq).square().sum().backward()
    for actual, expected in zip(model.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-9)


def test_weights_with_gaps_or_many_rows_are_packed() -> None:
    assert has_few_rows(63, torch.zeros(4, 8))
    assert not has_few_rows(64, torch.zeros(4, 8))
    assert has_few_rows(255, torch.zeros(256, 8192)) and not has_few_rows(256, torch.zeros(256, 8192))
    assert has_few_rows(1023, torch.zeros(4, 8), in_training=True)
    assert not has_few_rows(1024, torch.zeros(4, 8), in_training=True)
    assert not has_few_rows(3, torch.zeros(8, 4).T)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("change", ["layout", "values"])
def test_data_replaced_before_backward_changes_no_gradient(change: str) -> None:
    model, layer, x_seq = made("vectors", torch.float64)
    net, stepped = snnfx.convert(model, example_inputs=x_seq[0]), copy.deepcopy(model)
    loss, expected_loss = net(x_seq).square().sum(), step_model(stepped, x_seq).square().sum()
    for weight in (layer.weight, stepped[3].weight):  # type: ignore[index]
        weight.data = weight.data.T.contiguous().T if change == "layout" else torch.ones_like(weight)
    loss.backward()
    expected_loss.backward()
    for actual, expected in zip(model.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-9)
