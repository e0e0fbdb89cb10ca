"""Products of matrices with spikes, as in attention, run by events: values, gradients and nets equal torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.ir.facts import SITE, SPIKES
from snnfx.ir.sites import new_site
from snnfx.lowering.events import crossovers, spike_matrices
from snnfx.lowering.events.matrix_kernel import product_of_matrices
from snnfx.lowering.events.spike_matrices import decision_at, matmul_by_events
from support.stepping import step_model

SHAPES = [
    ((), 5, 7, 9),
    ((3,), 64, 32, 64),
    ((2, 4), 64, 64, 32),
    ((2, 3, 2), 17, 130, 70),
    ((2,), 1, 64, 1),
    ((2,), 33, 200, 129),
    ((0, 2), 3, 4, 5),
    ((2,), 3, 0, 5),
]
"""Batch, rows, inner size, columns."""


def transposed(x: Tensor) -> Tensor:
    """Equal values whose rows are the fastest dimension."""
    return x.mT.contiguous().mT


def spikes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(*shape) < 0.25).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layouts", ["row row", "row column", "column row", "column column"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_equals_the_dense_one(
    shape: tuple[tuple[int, ...], int, int, int], layouts: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    batch, M, K, N = shape
    ones = spikes(*batch, M, K, dtype=dtype)
    firsts = (ones, ones * torch.randn(*batch, M, K, dtype=dtype))
    seconds = (spikes(*batch, K, N, dtype=dtype), torch.randn(*batch, K, N, dtype=dtype))
    first_layout, second_layout = layouts.split()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for a in firsts:
        for b in seconds:
            first = transposed(a) if first_layout == "column" else a
            second = transposed(b) if second_layout == "column" else b
            for counts in (False, True):
                y = product_of_matrices(first, second, counts)
                assert y is not None and y.is_contiguous()
                torch.testing.assert_close(y.double(), a.double() @ b.double(), rtol=tolerance, atol=tolerance)


def test_views_of_heads_are_read_in_place() -> None:
    torch.manual_seed(0)
    q, k, v = spikes(2, 50, 3 * 96).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (3, 32)).transpose(1, 2) for x in (q, k, v))
    counts = product_of_matrices(q, k.mT, True)
    assert counts is not None and torch.equal(counts, q @ k.mT)
    y = product_of_matrices(counts, v, False)
    assert y is not None and torch.equal(y, counts @ v)
    assert torch.equal(product_of_matrices(q.expand(2, 3, 50, 32), v.mT, False), q @ v.mT)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_second_operand_that_is_not_finite_is_refused(value: float) -> None:
    for layout in (lambda x: x, transposed):
        b = torch.randn(2, 70, 33)
        b[1, 69, 32] = value
        assert product_of_matrices(torch.zeros(2, 3, 70), layout(b), True) is None


def test_numbers_that_are_not_finite_in_the_first_operand_reach_the_product() -> None:
    a = torch.zeros(1, 20, 70)
    a[0, 19, 69], a[0, 3, 5] = float("nan"), float("inf")
    y = product_of_matrices(a, torch.ones(1, 70, 3), True)
    assert y is not None and y[0, 19].isnan().all() and y[0, 3].isinf().all() and not y[0, 0].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_the_product(threads: int) -> None:
    torch.manual_seed(0)
    a, b = spikes(1, 300, 200, dtype=torch.float32), torch.randn(1, 200, 40)
    expected = product_of_matrices(a, b, False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = product_of_matrices(a, b, False)
    finally:
        torch.set_num_threads(before)
    assert y is not None and torch.equal(y, expected)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All products up to a density of 0.9 run by events."""
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(crossovers.REMEMBERED, "get", lambda *_: 0.9)
    monkeypatch.setattr(crossovers.REMEMBERED, "_known", {})
    monkeypatch.setattr(spike_matrices, "_LEAST_WORK", 1)
    yield


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_gradients_are_exact_also_second_and_batched_ones(which: str) -> None:
    torch.manual_seed(0)
    a = (torch.randn(2, 5, 4, dtype=torch.float64) if which == "second" else spikes(2, 5, 4)).requires_grad_()
    b = (torch.randn(2, 4, 3, dtype=torch.float64) if which == "first" else spikes(2, 4, 3)).requires_grad_()
    site = new_site()

    def function(a: Tensor, b: Tensor) -> Tensor:
        # gradcheck moves zeros; all products run by events
        return matmul_by_events(a, b, which, site)

    monkey = spike_matrices._density
    spike_matrices._density = lambda _: 0.1  # type: ignore[assignment]
    try:
        assert torch.autograd.gradcheck(function, (a, b), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, (a, b))
    finally:
        spike_matrices._density = monkey
    decision = decision_at(site)
    assert decision is not None and decision.by_events


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_only_the_gradients_that_are_needed_are_computed(which: str) -> None:
    for needs in ((True, False), (False, True)):
        a, b = spikes(2, 5, 4).requires_grad_(needs[0]), spikes(2, 4, 3).requires_grad_(needs[1])
        matmul_by_events(a, b, which, new_site()).square().sum().backward()
        c, d = (x.detach().clone().requires_grad_(x.requires_grad) for x in (a, b))
        (c @ d).square().sum().backward()
        for actual, expected in ((a, c), (b, d)):
            assert (actual.grad is None) == (expected.grad is None)
            if expected.grad is not None:
                torch.testing.assert_close(actual.grad, expected.grad)


def test_operands_of_other_forms_run_densely() -> None:
    a, b = spikes(2, 5, 4), torch.randn(4, 3, dtype=torch.float64)
    pairs = [(a, b[:, 0]), (a[0, 0], b), (a.half(), b.half()), (a[:1], torch.stack((b, b)))]
    for first, second in pairs:
        site = new_site()
        torch.testing.assert_close(matmul_by_events(first, second, "first", site), first @ second)
        assert decision_at(site) is None
    with pytest.raises(RuntimeError):
        matmul_by_events(spikes(2, 5, 4), spikes(2, 5, 4), "both", new_site())


@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 4), (2, 3, 6, 4)])
def test_a_parameter_as_second_operand_is_read_where_it_lies(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a, weight, site = spikes(*shape), nn.Parameter(torch.randn(4, 9, dtype=torch.float64)), new_site()
    y = matmul_by_events(a, weight, "first", site)
    torch.testing.assert_close(y, a @ weight)
    y.square().sum().backward()
    found, weight.grad = weight.grad, None
    (a @ weight).square().sum().backward()
    torch.testing.assert_close(found, weight.grad)
    decision = decision_at(site)
    assert decision is not None and decision.by_events


def test_the_gradient_of_a_parameter_runs_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, weight, used = spikes(2, 20, 16), nn.Parameter(torch.randn(16, 9, dtype=torch.float64)), []
    original = spike_matrices.gradient_by_events
    monkeypatch.setattr(spike_matrices, "gradient_by_events", lambda *a: used.append(True) or original(*a))
    (found,) = torch.autograd.grad(matmul_by_events(a, weight, "first", new_site()).square().sum(), weight)
    torch.testing.assert_close(found, torch.autograd.grad((a @ weight).square().sum(), weight)[0])
    assert used


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(40, 16), (2, 20, 16)])
def test_gradients_that_are_not_finite_reach_a_parameter(shape: tuple[int, ...], value: float) -> None:
    torch.manual_seed(0)
    a, weight = spikes(*shape), nn.Parameter(torch.randn(16, 9, dtype=torch.float64))
    grad = torch.randn(*shape[:-1], 9, dtype=torch.float64)
    grad.view(-1)[7] = value
    found = torch.autograd.grad(matmul_by_events(a, weight, "first", new_site()), weight, grad)
    torch.testing.assert_close(found, torch.autograd.grad(a @ weight, weight, grad), equal_nan=True)


@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_crossovers_are_measured_with_finite_numbers(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def crossover(
        key: object, x: Tensor, dense: Callable[[Tensor], Tensor], events: Callable[[Tensor], Tensor | None]
    ) -> float:
        measured.append((dense(x), events(x)))
        return 0.9

    monkeypatch.setattr(spike_matrices, "crossover", crossover)
    a, b = spikes(2, 20, 20), spikes(2, 20, 20)
    other = a if which == "second" else b
    other[1, 3, 5] = float("nan")
    torch.testing.assert_close(matmul_by_events(a, b, which, new_site()), a @ b, equal_nan=True)
    ((dense, by_events),) = measured
    assert by_events is not None and torch.equal(dense, by_events)


@pytest.mark.parametrize("which", ["first", "second", "both"])
@pytest.mark.parametrize("shape", [(16, 9), (2, 16, 9)])
def test_gradients_that_are_lazily_negated(which: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a, b = spikes(*shape[:-2], 20, 16).requires_grad_(), spikes(*shape).requires_grad_()
    grad = torch._neg_view(torch.randn(*shape[:-2], 20, 9, dtype=torch.float64))
    found = torch.autograd.grad(matmul_by_events(a, b, which, new_site()), (a, b), grad)
    torch.testing.assert_close(found, torch.autograd.grad(a @ b, (a, b), grad))


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(v_threshold=0.3)


class Attention(nn.Module):
    """Spiking self-attention; `form` computes it from queries, keys and values `[N, heads, tokens, *]`."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.q_lif, self.k_lif, self.v_lif, self.y_lif = (lif() for _ in range(4))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        pairs = ((self.q, self.q_lif), (self.k, self.k_lif), (self.v, self.v_lif))
        q, k, v = (neuron(layer(x)).unflatten(-1, (2, 16)).transpose(1, 2) for layer, neuron in pairs)
        y = self.form(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.out(self.y_lif(y))
        return result


FORMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[str]]] = {
    "q k, v": (lambda q, k, v: (q @ k.transpose(-2, -1)) @ v * 0.2, ["both", "both"]),
    "q (k v)": (lambda q, k, v: 0.2 * torch.matmul(q, k.mT.matmul(v)), ["both", "both"]),
    "softmax": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, ["both", "second"]),
    "bmm": (
        lambda q, k, v: torch.stack([torch.bmm(q[:, i], k[:, i].mT).bmm(v[:, i]) for i in range(2)], 1),
        ["both"] * 4,
    ),
    "scaled currents": (lambda q, k, v: (q * 0.2 @ k.mT + 1.0) @ v, ["both", "second"]),
}


def matmul_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ k.mT @ v * 0.2


def made(form: str) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(FORMS[form][0]).double(), torch.randn(4, 3, 10, 32, dtype=torch.float64) * 2


@pytest.mark.parametrize("form", FORMS)
def test_attention_by_events_equals_stepping(form: str) -> None:
    model, x_seq = made(form)
    net, stepped = snnfx.convert(model, example_inputs=x_seq[0]), copy.deepcopy(model)
    products = [node for node in net.program.graph.nodes if SPIKES.of(node)]
    assert [SPIKES.of(node) for node in products] == FORMS[form][1]
    for _ in range(4):
        model.zero_grad()
        net(x_seq).square().sum().backward()
    y = step_model(stepped, x_seq)
    y.square().sum().backward()
    assert y.any()
    for actual, expected in zip(model.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(net(x_seq), y, rtol=1e-9, atol=1e-9)
    decisions = [decision_at(SITE.of(node)) for node in products]  # type: ignore[arg-type]
    assert all(decision is not None and decision.by_events for decision in decisions)


def test_explain_shows_how_the_products_ran() -> None:
    model, x_seq = made("q k, v")
    net = snnfx.convert(model, example_inputs=x_seq[0])
    net(x_seq)
    lines = [line for line in str(snnfx.explain(net)).splitlines() if "matmul` ran by events" in line]
    assert len(lines) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_explain_of_a_copy_does_not_show_the_calls_of_the_original(copied: Callable[[snnfx.Net], snnfx.Net]) -> None:
    model, x_seq = made("q k, v")
    model.form = matmul_twice
    net = snnfx.convert(model, example_inputs=x_seq[0])
    net(x_seq)
    before = str(snnfx.explain(net))
    clone = copied(net)
    assert "ran by events" not in str(snnfx.explain(clone))
    clone(torch.zeros_like(x_seq))
    assert str(snnfx.explain(net)) == before
    assert str(snnfx.explain(clone)).count("matmul` ran by events: 0.0%") == 2


class WithSpikeFunction(nn.Module):
    """A neuron written in the step, with a spike function as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.currents, self.spike, self.v = nn.Linear(32, 32), snnfx.surrogate.ATan(), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        v = 0.5 * self.v + self.currents(x)
        z: Tensor = self.spike(v - 1.0)
        self.v = v - z
        return z @ z.mT @ z


def test_products_of_spikes_of_a_spike_function_run_by_events() -> None:
    torch.manual_seed(0)
    model, x_seq = WithSpikeFunction().double(), torch.randn(4, 3, 10, 32, dtype=torch.float64)
    net, stepped = snnfx.convert(model, example_inputs=x_seq[0]), copy.deepcopy(model)
    net(x_seq).sum().backward()
    y = step_model(stepped, x_seq)
    y.sum().backward()
    torch.testing.assert_close(net(x_seq), y)
    torch.testing.assert_close(model.currents.weight.grad, stepped.currents.weight.grad)
    products = [node for node in net.program.graph.nodes if SPIKES.of(node)]
    assert [SPIKES.of(node) for node in products] == ["both", "both"]
    decisions = [decision_at(SITE.of(node)) for node in products]  # type: ignore[arg-type]
    assert all(decision is not None and decision.by_events for decision in decisions)


def test_lower_dense_marks_no_product() -> None:
    model, x_seq = made("q k, v")
    net = snnfx.convert(model, example_inputs=x_seq[0], lower="dense")
    torch.testing.assert_close(net(x_seq), step_model(copy.deepcopy(model), x_seq))
    assert not any(SPIKES.of(node) for node in net.program.graph.nodes)


def test_products_of_other_values_are_not_marked() -> None:
    model, x_seq = made("q k, v")
    model.form = lambda q, k, v: (q + 1.0) @ (k - 1.0).mT @ (v + 1.0)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    assert not any(SPIKES.of(node) for node in net.program.graph.nodes)


def test_transforms_and_autocast_run_densely() -> None:
    model, x_seq = made("q k, v")
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        expected = step_model(copy.deepcopy(model), x_seq)
        batched = torch.func.vmap(net)(torch.stack((x_seq, x_seq)))
    torch.testing.assert_close(batched[1], expected, rtol=1e-9, atol=1e-9)
    assert all(decision_at(SITE.of(n)) is None for n in net.program.graph.nodes if SPIKES.of(n))  # type: ignore[arg-type]
