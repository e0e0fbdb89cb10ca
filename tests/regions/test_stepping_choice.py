"""Short mixed loops: run by kernels or step by step, whichever was measured to be faster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.regions import stepping_choice
from snnfx.regions.region_modules import LoopRegion
from snnfx.regions.stepping_choice import LOOPS
from support.stepping import assert_same


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input, self.back, self.lif = nn.Linear(5, 7), nn.Linear(7, 7), neuron.LIFNode(v_threshold=0.2)
        self.z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.input(x)
        z = torch.zeros_like(current) if self.z is None else self.z
        self.z = self.lif(current + self.back(z))
        return self.z


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    LOOPS.remembered.forget()
    yield
    LOOPS.remembered.forget()


def measured_as(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The names of the fixed choices of all measurements, which run both ways."""
    measured: list[str] = []

    def measure(fixed: str, functions: dict[str, object]) -> str:
        measured.append(fixed)
        for function in functions.values():
            function()  # type: ignore[operator]
        return name

    monkeypatch.setattr(LOOPS, "measure", measure)
    return measured


def made() -> tuple[nn.Module, snnfx.Net]:
    model = Recurrent().double()
    return model, snnfx.convert(model, example_inputs=torch.rand(2, 5).double())


def stepped(model: nn.Module, x_seq: Tensor) -> Tensor:
    model.z = None  # type: ignore[assignment]
    model.lif.reset()  # type: ignore[union-attr, operator]
    y_seq = torch.stack([model(x) for x in x_seq])
    model.z = None  # type: ignore[assignment]
    model.lif.reset()  # type: ignore[union-attr, operator]
    return y_seq


def reasons(net: snnfx.Net) -> list[str]:
    modules = net.region_modules().values()
    return [m.kernels.reason_for_steps for m in modules if isinstance(m, LoopRegion) and m.kernels is not None]


@pytest.mark.parametrize("name", LOOPS.names)
@pytest.mark.parametrize("T", [1, 3])
def test_both_ways_equal_stepping(monkeypatch: pytest.MonkeyPatch, name: str, T: int) -> None:
    measured = measured_as(monkeypatch, name)
    model, net = made()
    parameters = list(model.parameters())
    for _ in range(3):
        x_seq = 3 * torch.randn(T, 2, 5).double().requires_grad_()
        expected = stepped(model, x_seq)
        assert_same(net(x_seq), expected)
        wanted = torch.autograd.grad(expected.sum(), (x_seq, *parameters), allow_unused=True)
        assert_same(torch.autograd.grad(net(x_seq).sum(), (x_seq, *parameters), allow_unused=True), wanted)
        with torch.no_grad():
            assert_same(net(x_seq), expected.detach())
    assert len(measured) == 2 * 2  # twice with gradients, twice without


def test_explain_says_that_stepping_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, "steps")
    _, net = made()
    with torch.no_grad():
        net(torch.rand(2, 2, 5).double())
        assert "because this was measured to be faster for 2 steps" in str(snnfx.explain(net))
        net(torch.rand(30, 2, 5).double())
    assert "measured to be faster" not in str(snnfx.explain(net))
    assert reasons(net) == [""]


def test_long_and_large_calls_run_by_kernels_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_as(monkeypatch, "steps")
    _, net = made()
    with torch.no_grad():
        net(torch.rand(stepping_choice._MOST_STEPS + 1, 2, 5).double())
        net(torch.rand(2, stepping_choice._MOST_ELEMENTS, 5).double())
    assert not measured and reasons(net) == [""]


def test_pinned_choices_run_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_as(monkeypatch, "steps")
    monkeypatch.setenv("SNNFX_MEASURE", "0")
    _, net = made()
    with torch.no_grad():
        net(torch.rand(2, 2, 5).double())
    assert not measured and reasons(net) == [""]


def test_a_measurement_leaves_no_gradients_and_calls_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_as(monkeypatch, "kernels")
    model, net = made()
    x_seq = torch.rand(2, 2, 5).double().requires_grad_()
    x_seq.register_hook(lambda _: pytest.fail("called"))
    generator = torch.get_rng_state()
    net(x_seq)
    assert measured
    assert x_seq.grad is None and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    calls: list[int] = []
    model.back.weight.register_hook(lambda _: calls.append(1))  # type: ignore[union-attr]
    measured.clear()
    net(torch.rand(3, 2, 5).double())
    assert not measured and not calls


def test_a_kernel_of_an_elementwise_loop_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_as(monkeypatch, "steps")
    net = snnfx.convert(nn.Sequential(nn.Linear(5, 7), neuron.LIFNode()))
    with torch.no_grad():
        net(torch.rand(2, 2, 5))
    assert not measured


class MaskedRecurrent(nn.Module):
    """The weight of the recurrence is computed from a parameter, once for all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5, 5))
        self.register_buffer("mask", 1 - torch.eye(5))

    def forward(self, x: Tensor) -> Tensor:
        z, outputs = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            z = torch.sigmoid(x[t] + z @ (self.weight * self.mask))
            outputs.append(z)
        return torch.stack(outputs)


def test_a_measurement_leaves_the_graph_of_a_computed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_as(monkeypatch, "kernels")
    model = MaskedRecurrent().double()
    x_seq = torch.rand(3, 2, 5).double()
    net = snnfx.convert(model, takes="sequence", example_inputs=(x_seq,))
    (wanted,) = torch.autograd.grad(model(x_seq).sum(), [model.weight])
    (found,) = torch.autograd.grad(net(x_seq).sum(), [model.weight])
    assert measured
    assert_same(found, wanted)


def test_another_version_of_the_loop_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measured_as(monkeypatch, "kernels")
    for count, source in ((2, "one"), (2, "one"), (4, "another")):
        monkeypatch.setattr(stepping_choice, "LOOP_SOURCE", source)
        LOOPS.remembered.forget()
        _, net = made()
        with torch.no_grad():
            net(torch.rand(3, 2, 5).double())
        assert len(measured) == count
