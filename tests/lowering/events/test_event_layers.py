"""Layers of a converted net that read spikes run by events at a low density, and densely otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import snnfx
from snnfx.lowering.events import crossovers
from snnfx.lowering.events.event_gradients import Gradients, differentiable_product
from snnfx.lowering.events.event_kernel import product
from snnfx.lowering.events.geometry import LINEAR, convolution
from snnfx.lowering.events.layer_decisions import Decision, latest_decision
from snnfx.lowering.events.packed_weights import pack
from support.stepping import step_model


class Spike(nn.Module):
    """A neuron whose output is sparse and independent of rounding: a threshold of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 1.5).to(x.dtype)


class Parallel(nn.Module):
    """Spikes reach a layer through a pooling, a concatenation and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.spike, self.pool = snnfx.neuron.IFNode(v_threshold=3.0), nn.MaxPool2d(2)
        self.conv = nn.Conv2d(16, 64, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.pool(self.spike(x))
        y: Tensor = self.conv(torch.cat((s, s + s), 1))
        return y


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 2048))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear((x > 1.5).to(x.dtype).flatten(1), self.weight)


def convolutional() -> nn.Module:
    return nn.Sequential(
        snnfx.neuron.IFNode(v_threshold=3.0), nn.Conv2d(8, 64, 3, padding=1), nn.BatchNorm2d(64), nn.AvgPool2d(2)
    )


def linear() -> nn.Module:
    return nn.Sequential(snnfx.neuron.IFNode(v_threshold=3.0), nn.Flatten(), nn.Linear(2048, 256))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolution, BatchNorm": convolutional,
    "linear": linear,
    "pool, cat, sum": Parallel,
    "comparison, functional": Functional,
}


@pytest.fixture(autouse=True)
def fixed_crossover(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One measured crossover decides in these tests."""
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(crossovers.REMEMBERED, "get", lambda *_: 0.4)
    monkeypatch.setattr(crossovers.REMEMBERED, "_known", {})
    yield


def weight_of(model: nn.Module) -> Tensor:
    return next(p for name, p in model.named_parameters() if name.endswith("weight"))


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval(), torch.randn(4, 16, 8, 16, 16, dtype=dtype)


def decision_of(model: nn.Module) -> Decision:
    decision = latest_decision(weight_of(model))
    assert decision is not None
    return decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_behind_spikes_runs_by_events_and_equals_stepping(name: str, dtype: torch.dtype) -> None:
    model, x_seq = made(name, dtype)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        expected = step_model(copy.deepcopy(model), x_seq)
        y = net(x_seq)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    decision = decision_of(model)
    assert decision.by_events
    assert 0.0 < decision.density < 0.4


@pytest.mark.parametrize("name", MODELS)
def test_lower_dense_runs_all_layers_densely(name: str) -> None:
    model, x_seq = made(name, torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0], lower="dense")
    with torch.no_grad():
        net(x_seq)
    assert latest_decision(weight_of(model)) is None


def test_a_dense_input_runs_densely() -> None:
    model, x_seq = made("linear", torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        net(x_seq.abs() + 2.0)
    assert not decision_of(model).by_events


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_run_densely(value: float) -> None:
    model, x_seq = made("linear", torch.float64)
    with torch.no_grad():
        weight_of(model)[3, 5] = value
        y = snnfx.convert(model, example_inputs=x_seq[0])(x_seq)
        expected = step_model(copy.deepcopy(model), x_seq)
    assert not decision_of(model).by_events
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_changed_weights_are_seen() -> None:
    model, x_seq = made("linear", torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        net(x_seq)
        weight_of(model).data[7] += 1.0
        expected = step_model(copy.deepcopy(model), x_seq)
        torch.testing.assert_close(net(x_seq), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("density", ["sparse", "denser"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_stepping(name: str, density: str) -> None:
    model, x_seq = made(name, torch.float64)
    x_seq = x_seq.repeat(1, 16 if name in ("linear", "comparison, functional") else 1, 1, 1, 1)
    x_seq = x_seq if density == "sparse" else x_seq + 0.7
    model.train()
    options = {"batch_norm": "per_step"} if name == "convolution, BatchNorm" else {}
    net, stepped = snnfx.convert(model, example_inputs=x_seq[0], **options), copy.deepcopy(model)
    y = net(x_seq)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (step_model(stepped, x_seq) * weights).sum().backward()
    assert decision_of(model).by_events == (decision_of(model).density < 0.4)
    for actual, expected in zip(model.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_input_reaches_the_neuron() -> None:
    model, x_seq = made("convolution, BatchNorm", torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    x, other = x_seq.clone().requires_grad_(), x_seq.clone().requires_grad_()
    net(x).sum().backward()
    assert decision_of(model).by_events
    step_model(copy.deepcopy(model), other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dims", "gradients"),
    [(0, Gradients.WEIGHT_BY_EVENTS), (0, Gradients.FEW_ROWS), (0, Gradients.DENSE), (2, Gradients.WEIGHT_BY_EVENTS)],
)
def test_second_and_batched_gradients_are_exact(dims: int, gradients: Gradients) -> None:
    torch.manual_seed(0)
    x = (torch.rand(8, 6, 5, 5) if dims else torch.rand(8, 6)).double().gt(0.8).double().requires_grad_()
    weight = torch.randn(9, 6, *(3, 3)[:dims], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    geometry = convolution(weight, (1, 1), (1, 1), (1, 1), 1) if dims else LINEAR
    assert geometry is not None

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tiles = pack(weight.detach(), 1)
        return differentiable_product(
            lambda x: product(x, geometry, 9, tiles, bias.detach()), x, weight, bias, geometry, gradients
        )

    assert torch.autograd.gradcheck(function, (x, weight, bias), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_explain_shows_the_way_and_the_density() -> None:
    model, x_seq = made("linear", torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    assert not snnfx.explain(net).events
    with torch.no_grad():
        net(x_seq)
    (sentence,) = snnfx.explain(net).events
    assert "ran by events" in sentence
    assert "%" in sentence


def test_explain_shows_why_a_layer_ran_densely() -> None:
    model, x_seq = made("linear", torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        net(x_seq.abs() + 4.0)
        (sentence,) = snnfx.explain(net).events
        assert "ran densely: 100.0% of its inputs" in sentence
        weight_of(model)[0, 0] = float("nan")
        net(x_seq)
        (sentence,) = snnfx.explain(net).events
        assert "ran densely: its weight is not finite" in sentence


def test_explain_shows_layers_that_read_bits() -> None:
    model, x_seq = made("linear", torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        for _ in range(5):
            net(x_seq)
    assert "ran by events" in snnfx.explain(net).events[0]


def test_verify_accepts_events() -> None:
    model, x_seq = made("convolution, BatchNorm", torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    assert snnfx.verify(model, net, x_seq, gradients=False)
    assert decision_of(model).by_events


def test_a_deterministic_run_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossovers.REMEMBERED, "get", lambda *_: pytest.fail("measured"))
    model, x_seq = made("linear", torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            net(x_seq)
    finally:
        torch.use_deterministic_algorithms(False)
    assert decision_of(model).crossover == crossovers.FIXED


@pytest.mark.parametrize("has_hook", [False, True])
def test_a_compiled_net_runs_by_events_if_it_is_one_operator(has_hook: bool) -> None:
    model, x_seq = made("linear", torch.float64)
    if has_hook:
        next(iter(model.children())).register_forward_hook(lambda module, given, result: None)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        expected = step_model(copy.deepcopy(model), x_seq)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x_seq), expected, rtol=1e-9, atol=1e-9)
    assert (latest_decision(weight_of(model)) is None) == has_hook


def test_vmap_runs_densely() -> None:
    model, x_seq = made("linear", torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        expected = step_model(copy.deepcopy(model), x_seq)
        batched = torch.func.vmap(net)(torch.stack((x_seq, x_seq)))
        torch.testing.assert_close(batched[1], expected, rtol=1e-9, atol=1e-9)
    assert latest_decision(weight_of(model)) is None


def test_the_global_random_state_is_unchanged_by_a_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(crossovers.REMEMBERED, "_known", {})
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    model, x_seq = made("linear", torch.float32)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    before = torch.get_rng_state()
    with torch.no_grad():
        net(x_seq)
    assert torch.equal(torch.get_rng_state(), before)
    crossover = decision_of(model).crossover
    assert crossover is not None and 0.0 <= crossover <= 0.9
    assert len(crossovers.REMEMBERED.stored()) == 1
