"""The memory format of small convolutions: chosen by a measurement that leaves no trace, shown by `explain`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.lowering.choices import image_formats
from snnfx.lowering.choices.image_formats import FORMATS, Convolution, convolve, fastest_format, forget_choices
from support.stepping import assert_same

LAYER: Convolution = ((4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1, False)
WEIGHTS = 4 * 3 * 3 * 3


@pytest.fixture(autouse=True)
def empty_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    forget_choices()
    yield
    forget_choices()


def model_of_images() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), neuron.LIFNode(), nn.Conv2d(4, 4, 1), neuron.LIFNode())
    return nn.Sequential(*layers)


def measured_as(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(FORMATS, "measure", lambda fixed, functions: name)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("name", FORMATS.names)
def test_images_are_in_the_measured_format(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    measured_as(monkeypatch, name)
    x = torch.rand(2, 3, 8, 8)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        y = fastest_format(given, WEIGHTS, LAYER)
        assert torch.equal(y, x)
        assert is_channels_last(y) == (name == "channels-last")


@pytest.mark.parametrize("name", FORMATS.names)
def test_few_images_are_convolved_one_by_one_where_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    measured_as(monkeypatch, name)
    layer, counts = nn.Conv2d(3, 4, 3), list[int]()
    layer.forward = lambda x: (counts.append(len(x)), nn.Conv2d.forward(layer, x))[1]  # type: ignore[func-returns-value, method-assign]
    for images in (1, 2, 3, 20):
        x = torch.rand(images, 3, 8, 8)
        y = convolve(layer, fastest_format(x, WEIGHTS, LAYER, is_split=True), LAYER)
        torch.testing.assert_close(y, nn.Conv2d.forward(layer, x))
    assert counts == ([1] * 6 + [20] if name == "one by one" else [1, 2, 3, 20])


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("images", [1, 2, 20])
def test_images_are_timed_one_by_one_only_if_they_are_few_and_can_be_split(
    monkeypatch: pytest.MonkeyPatch, images: int, is_split: bool
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(FORMATS, "measure", lambda fixed, functions: timed.extend(functions) or fixed)  # type: ignore[func-returns-value]
    fastest_format(torch.rand(images, 3, 8, 8), WEIGHTS, LAYER, is_split)
    assert ("one by one" in timed) == (is_split and images == 2)


@pytest.mark.parametrize("differentiates", [False, True])
@pytest.mark.parametrize("name", FORMATS.names)
def test_nets_equal_stepping_in_each_format(monkeypatch: pytest.MonkeyPatch, name: str, differentiates: bool) -> None:
    measured_as(monkeypatch, name)
    model = model_of_images().train(differentiates)
    net = snnfx.convert(copy.deepcopy(model), example_inputs=torch.rand(2, 3, 8, 8), batch_norm="per_step")
    x_seq = torch.rand(5, 2, 3, 8, 8)
    with torch.set_grad_enabled(differentiates):
        assert_same(net(x_seq), torch.stack([model(x) for x in x_seq]), 1e-5)


def test_large_float64_and_other_values_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "measure", lambda *_: pytest.fail("measured"))
    assert is_channels_last(fastest_format(torch.rand(64, 3, 64, 64), WEIGHTS, LAYER))
    assert fastest_format(torch.rand(2, 3, 8, 8).bfloat16(), 10**6, LAYER).is_contiguous()
    for x in (torch.rand(2, 3, 8, 8).double(), torch.rand(3, 8, 8), torch.rand(2, 3, 8, 8, device="meta")):
        assert fastest_format(x, WEIGHTS, LAYER) is x


@pytest.mark.parametrize("training", [False, True])
def test_a_measurement_leaves_no_trace(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = FORMATS.measure
    monkeypatch.setattr(FORMATS, "measure", lambda *a: calls.append(a) or measure(*a))  # type: ignore[func-returns-value]
    model = model_of_images().train(training)
    net, x_seq = snnfx.convert(model, example_inputs=torch.rand(2, 3, 8, 8)), torch.rand(5, 2, 3, 8, 8)
    with monkeypatch.context() as pinned:
        pinned.setenv("SNNFX_MEASURE", "0")
        snnfx.convert(copy.deepcopy(model), example_inputs=torch.rand(2, 3, 8, 8))(x_seq)  # builds the kernels
    forget_choices()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        net(x_seq)
    assert calls
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    if not training:
        assert_same(model.state_dict(), before, 0.0)


def test_explain_shows_the_format_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, "row-major")
    net = snnfx.convert(model_of_images().eval(), example_inputs=torch.rand(2, 3, 8, 8))
    assert snnfx.explain(net).formats == ()
    with torch.no_grad():
        net(torch.rand(5, 2, 3, 8, 8))
    report = snnfx.explain(net)
    assert report.formats == ("Images are row-major in `0` and `3` (measured).",)
    assert "Memory format" in str(report)


def test_explain_names_the_setting_that_fixes_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_MEASURE", "0")
    net = snnfx.convert(model_of_images().eval(), example_inputs=torch.rand(2, 3, 8, 8))
    with torch.no_grad():
        net(torch.rand(5, 2, 3, 8, 8))
    (sentence,) = snnfx.explain(net).formats
    assert "channels-last" in sentence and "(fixed by SNNFX_MEASURE=0)" in sentence


def test_a_net_that_the_compiler_traces_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FORMATS, "measure", lambda *_: pytest.fail("measured"))
    model = model_of_images().eval()
    next(model.children()).register_forward_hook(lambda *_: None)  # a net with hooks is not one operator
    net, x_seq = snnfx.convert(model, example_inputs=torch.rand(2, 3, 8, 8)), torch.rand(3, 2, 3, 8, 8)
    with torch.no_grad():
        y_seq = torch.compile(net, fullgraph=True, backend="aot_eager")(x_seq)
        assert_same(y_seq, torch.stack([model(x) for x in x_seq]), 1e-5)


def test_few_choices_are_decided_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, "row-major")
    monkeypatch.setattr(image_formats, "_MOST_DECIDED", 2)
    for size in range(4, 10):
        fastest_format(torch.rand(1, 3, size, size), WEIGHTS, LAYER)
    assert len(image_formats._decided) <= 2
