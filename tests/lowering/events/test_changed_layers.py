"""Layers that read spikes as bits equal torch's when their settings, parameters or places change between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.lowering.events import crossovers
from snnfx.lowering.events.layer_decisions import latest_decision
from support.stepping import assert_same, fresh_copy, step_model


@pytest.fixture(autouse=True)
def fixed_crossover(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers run by events up to a density of 0.9."""
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(crossovers.REMEMBERED, "get", lambda *_: 0.9)
    monkeypatch.setattr(crossovers.REMEMBERED, "_known", {})
    yield


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1),
        snnfx.neuron.LIFNode(v_threshold=0.4),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 64, 3, padding=1),
    )


def flat() -> nn.Sequential:
    model = convolutional()
    return nn.Sequential(*model[:3], nn.Flatten(), nn.Linear(8192, 256))


def few_rows() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8192), snnfx.neuron.LIFNode(v_threshold=0.4), nn.Linear(8192, 256))


def running(make: Callable[[], nn.Sequential]) -> tuple[nn.Sequential, Any, Tensor]:
    """A model, its net after calls that read bits, and inputs."""
    torch.manual_seed(0)
    model = make().double().eval()
    x_seq = torch.rand(9, 2, *((16,) if make is few_rows else (3, 16, 16)), dtype=torch.float64) * 2
    net = snnfx.convert(model, example_inputs=x_seq[0])
    with torch.no_grad():
        for _ in range(4):
            net(x_seq)
    decision = latest_decision(model[-1].weight)  # type: ignore[arg-type]
    assert decision is not None and decision.by_events
    return model, net, x_seq


def outcome(function: Callable[[], Tensor]) -> Tensor | type[Exception]:
    try:
        with torch.no_grad():
            return function()
    except Exception as error:
        return type(error)


def check(model: nn.Module, net: Any, x_seq: Tensor) -> None:
    """Net and stepped model return the same numbers, or raise the same class."""
    for _ in range(3):
        expected = outcome(lambda: step_model(fresh_copy(model), x_seq))
        actual = outcome(lambda: net(x_seq))
        if isinstance(expected, Tensor):
            assert_same(actual, expected)
        else:
            assert actual is expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", None),
        ("stride", (1,)),
        ("stride", ()),
        ("stride", []),
        ("stride", 0),
        ("stride", -1),
        ("kernel_size", (2,)),
        ("kernel_size", [3, 2]),
        ("kernel_size", (1, 2, 3)),
        ("kernel_size", 0),
        ("kernel_size", 2.0),
        ("kernel_size", 20),
        ("padding", -1),
        ("padding", (0, 1)),
        ("padding", 2),
        ("ceil_mode", True),
    ],
)
def test_a_pooling_takes_the_settings_that_torch_takes(name: str, value: object) -> None:
    model, net, x_seq = running(convolutional)
    setattr(model[2], name, value)
    check(model, net, x_seq)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", [2, 1]),
        ("stride", (2,)),
        ("stride", 0),
        ("stride", (1, 2, 3)),
        ("padding", -1),
        ("padding", "same"),
        ("padding", "other"),
        ("dilation", 9),
        ("dilation", 0),
        ("groups", 0),
        ("groups", -1),
        ("groups", 2),
    ],
)
def test_a_convolution_takes_the_settings_that_torch_takes(name: str, value: object) -> None:
    model, net, x_seq = running(convolutional)
    setattr(model[3], name, value)
    check(model, net, x_seq)


def test_a_convolution_with_steps_takes_no_equal_padding() -> None:
    model, net, x_seq = running(convolutional)
    layer: Any = model[3]
    layer.stride, layer.padding = 2, "same"
    check(model, net, x_seq)


@pytest.mark.parametrize("outputs", [63, 64])
def test_outputs_that_groups_do_not_share_raise_as_in_torch(outputs: int) -> None:
    model, net, x_seq = running(convolutional)
    layer: Any = model[3]
    layer.groups, layer.bias = 2, None
    layer.weight = nn.Parameter(torch.randn(outputs, 64, 3, 3, dtype=torch.float64))
    check(model, net, x_seq)


@pytest.mark.parametrize(("place", "name"), [(2, "stride"), (2, "kernel_size"), (3, "stride"), (3, "padding")])
def test_settings_that_are_lists_may_change_in_place(place: int, name: str) -> None:
    model, net, x_seq = running(convolutional)
    setting = [2, 2] if place == 2 else [1, 1]
    setattr(model[place], name, setting)
    check(model, net, x_seq)
    setting[1] = 3 - setting[1]
    check(model, net, x_seq)


@pytest.mark.parametrize("make", [convolutional, flat, few_rows])
@pytest.mark.parametrize("shape", [(1,), (), (1, -1), (-1,)])
def test_a_bias_of_another_shape_is_never_read_behind_its_end(
    make: Callable[[], nn.Sequential], shape: tuple[int, ...]
) -> None:
    model, net, x_seq = running(make)
    layer: Any = model[-1]
    outputs = len(layer.weight)
    sizes = [outputs - 1 if n == -1 and len(shape) == 1 else outputs if n == -1 else n for n in shape]
    layer.bias = nn.Parameter(torch.full(sizes, 3.0, dtype=torch.float64))
    check(model, net, x_seq)


def test_a_layer_that_swaps_its_name_with_another_is_called_in_its_new_place() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.spike = snnfx.neuron.LIFNode(v_threshold=0.4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.spike(self.first(x)))
            return y

    torch.manual_seed(0)
    model, x_seq = Named().double(), torch.rand(5, 2, 8, dtype=torch.float64) * 2
    net = snnfx.convert(model, example_inputs=x_seq[0])
    check(model, net, x_seq)
    first, second = model.first, model.second
    del model.first, model.second
    model.second, model.first = first, second  # the same order of children
    check(model, net, x_seq)


def test_a_linear_layer_takes_a_weight_of_one_dimension() -> None:
    model, net, x_seq = running(few_rows)
    layer: Any = model[-1]
    layer.weight, layer.bias = nn.Parameter(torch.rand(8192, dtype=torch.float64)), None
    check(model, net, x_seq)


@pytest.mark.parametrize("make", [convolutional, flat, few_rows])
def test_a_net_of_another_dtype_writes_numbers(make: Callable[[], nn.Sequential]) -> None:
    model, net, x_seq = running(make)
    net.to(torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            assert net(x_seq.bfloat16()).dtype == torch.bfloat16
    assert latest_decision(model[-1].weight) is None  # type: ignore[arg-type]
    assert "ran by events" not in str(snnfx.explain(net))
    net.to(torch.float64)
    check(model, net, x_seq)
    assert "ran by events" in str(snnfx.explain(net))


@pytest.mark.parametrize("make", [convolutional, flat, few_rows])
def test_explain_knows_calls_that_did_not_decide(make: Callable[[], nn.Sequential]) -> None:
    model, net, x_seq = running(make)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        net(x_seq)
    assert latest_decision(model[-1].weight) is None  # type: ignore[arg-type]
    with torch.no_grad():
        net(x_seq)
    assert "ran by events" in str(snnfx.explain(net))
    handle = model[-1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        net(x_seq)
    handle.remove()
    assert latest_decision(model[-1].weight) is None  # type: ignore[arg-type]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), snnfx.neuron.LIFNode(v_threshold=0.4), nn.Linear(32, 16)).double()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_becomes_an_attribute_is_read(name: str) -> None:
    torch.manual_seed(0)
    model, x_seq = small(), torch.rand(6, 4, 12, dtype=torch.float64) * 2
    net = snnfx.convert(model, example_inputs=x_seq[0])
    check(model, net, x_seq)
    given = getattr(model[2], name).detach() * 2
    delattr(model[2], name)
    setattr(model[2], name, given)
    check(model, net, x_seq)


@pytest.mark.parametrize("sizes", [(16, 16), (256, 256)])
def test_a_linear_layer_reads_the_lines_of_images(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    inputs, outputs = sizes
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), snnfx.neuron.LIFNode(v_threshold=0.4), nn.Linear(inputs, outputs)
    ).double()
    x_seq = torch.rand(3, 2, 3, 8, inputs, dtype=torch.float64) * 2
    net = snnfx.convert(model, example_inputs=x_seq[0])
    check(model, net, x_seq)


@pytest.mark.parametrize("sizes", [(64, 128), (64, 128, 3), (64, 128, 3, 3, 3, 3)])
def test_a_convolution_with_a_weight_of_other_dimensions_raises_as_in_torch(sizes: tuple[int, ...]) -> None:
    model, net, x_seq = running(convolutional)
    layer: Any = model[3]
    layer.weight = nn.Parameter(torch.rand(sizes, dtype=torch.float64))
    check(model, net, x_seq)
