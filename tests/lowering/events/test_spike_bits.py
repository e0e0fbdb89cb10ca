"""Neurons write spikes as bits while all layers that read them run by events; results are those of stepping."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import snnfx
from snnfx.lowering.events import crossovers
from snnfx.lowering.events.layer_decisions import latest_decision
from snnfx.lowering.events.spike_bits import MaxPooling, SpikeBits
from snnfx.lowering.events.spike_readers import SpikeReader
from support.stepping import step_model

FORMS = {
    "row-major": (0, 1, 2, 3),
    "channels-last": (0, 2, 3, 1),
}


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(v_threshold=0.4)


def convolutions(groups: int = 1, dilation: int = 1, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(128, 64, 3, stride=stride, padding=1, dilation=dilation, groups=groups)
    return nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), lif(), conv, lif())


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), lif(), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(64, 128, 3), lif()
    )


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), lif(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 128), lif()
    )


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 512), lif(), nn.Linear(512, 512), lif(), nn.Linear(512, 512))


class Branches(nn.Module):
    """Two layers read the spikes of one neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.third = nn.Conv2d(3, 64, 3, padding=1), lif(), lif(), lif()
        self.left, self.right = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.first(self.stem(x))
        y: Tensor = self.second(self.left(s)) + self.third(self.right(s))
        return y


class AlsoAnOutput(nn.Module):
    """The spikes are an output as well, so that they are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.neuron, self.conv = nn.Conv2d(3, 64, 3, padding=1), lif(), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.neuron(self.stem(x))
        return self.conv(s), s


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions,
    "groups": lambda: convolutions(groups=2),
    "dilation": lambda: convolutions(dilation=2),
    "stride": lambda: convolutions(stride=2),
    "pools": pooled,
    "flatten": flattened,
    "linear": linear,
    "two readers": Branches,
}


@pytest.fixture(autouse=True)
def fixed_crossover(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measurement decides in these tests."""
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(crossovers.REMEMBERED, "get", lambda *_: 0.6)
    monkeypatch.setattr(crossovers.REMEMBERED, "_known", {})
    yield


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[SpikeBits]:
    """All spikes that layers read as bits."""
    found: list[SpikeBits] = []
    read = SpikeReader.__call__

    def recording(reader: SpikeReader, spikes: SpikeBits) -> Tensor | None:
        y = read(reader, spikes)
        if y is not None:
            found.append(spikes)
        return y

    monkeypatch.setattr(SpikeReader, "__call__", recording)
    return found


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, snnfx.Net, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(dtype)
    x_seq = torch.rand(4, 16, 3, 16, 16, dtype=dtype) * 2
    return model, snnfx.convert(model, example_inputs=x_seq[0]), x_seq


def warmed_up(net: Callable[[Tensor], Tensor], x_seq: Tensor) -> None:
    with torch.no_grad():
        for _ in range(4):
            net(x_seq)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in MODELS), ("linear", torch.float64)]
)  # images in float64 are row-major
def test_layers_read_bits_and_equal_stepping(name: str, dtype: torch.dtype, written: list[SpikeBits]) -> None:
    model, net, x_seq = made(name, dtype)
    warmed_up(net, x_seq)
    written.clear()
    with torch.no_grad():
        y, expected = net(x_seq), step_model(copy.deepcopy(model), x_seq)
    assert len(written) == {"linear": 2, "two readers": 2}.get(name, 1)
    if name == "linear":
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    else:
        assert (y != expected).double().mean() < 1e-3  # rounding flips few spikes


@pytest.mark.filterwarnings("ignore:SNNFX315")
def test_a_changed_weight_a_hook_and_gradients_are_seen(written: list[SpikeBits]) -> None:
    model, net, x_seq = made("linear", torch.float64)
    warmed_up(net, x_seq)
    layer = model[3]
    assert isinstance(layer, nn.Linear)

    def check(is_read: bool) -> None:
        written.clear()
        with torch.no_grad():
            expected = step_model(copy.deepcopy(model), x_seq)
            torch.testing.assert_close(net(x_seq), expected, rtol=1e-9, atol=1e-9)
        assert bool(written) == is_read

    layer.weight.data.mul_(1.1)
    check(True)
    with torch.no_grad():
        layer.weight.add_(0.001)
    check(True)
    model.load_state_dict({key: value * 1.05 for key, value in model.state_dict().items()})
    check(True)
    for fused in (True, False):
        optimizer = torch.optim.Adam(model.parameters(), fused=fused, foreach=not fused)
        net(x_seq).square().mean().backward()
        optimizer.step()
        check(True)
    handle = layer.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        net(x_seq)
    handle.remove()
    warmed_up(net, x_seq)
    check(True)
    layer.requires_grad_(False)
    check(True)
    nn.utils.parametrizations.weight_norm(layer)
    for _ in range(4):
        with torch.no_grad():
            torch.testing.assert_close(net(x_seq), step_model(copy.deepcopy(model), x_seq), rtol=1e-9, atol=1e-9)


def test_a_weight_that_is_not_finite_runs_densely(written: list[SpikeBits]) -> None:
    model, net, x_seq = made("linear", torch.float64)
    warmed_up(net, x_seq)
    assert written
    with torch.no_grad():
        model[5].weight[3, 5] = float("nan")
        for _ in range(3):
            written.clear()
            y = net(x_seq)
            torch.testing.assert_close(y, step_model(copy.deepcopy(model), x_seq), equal_nan=True)
    assert len(written) == 1  # the other layer


def test_dense_spikes_are_numbers_again(written: list[SpikeBits]) -> None:
    model, net, x_seq = made("linear", torch.float64)
    warmed_up(net, x_seq)
    with torch.no_grad():
        model[1].bias.fill_(100.0)
        model[3].bias.fill_(100.0)
        for _ in range(3):
            written.clear()
            torch.testing.assert_close(net(x_seq), step_model(copy.deepcopy(model), x_seq), rtol=1e-9, atol=1e-9)
    assert not written
    decision = latest_decision(model[3].weight)
    assert decision is not None and not decision.by_events


def test_spikes_that_are_an_output_are_numbers(written: list[SpikeBits]) -> None:
    torch.manual_seed(0)
    model, x_seq = AlsoAnOutput().eval(), torch.rand(4, 16, 3, 16, 16)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    warmed_up(net, x_seq)
    with torch.no_grad():
        spikes = net(x_seq)[1]
    assert not written
    assert spikes.dtype == torch.float32 and set(spikes.unique().tolist()) == {0.0, 1.0}


def test_other_sizes_and_gradients_after_bits(written: list[SpikeBits]) -> None:
    model, net, x_seq = made("linear", torch.float64)
    warmed_up(net, x_seq)
    for part in (x_seq[:, :3], x_seq[:2], x_seq[:, :8]):
        with torch.no_grad():
            torch.testing.assert_close(net(part), step_model(copy.deepcopy(model), part), rtol=1e-9, atol=1e-9)
    written.clear()
    stepped = copy.deepcopy(model)
    net(x_seq).square().sum().backward()
    step_model(stepped, x_seq).square().sum().backward()
    assert not written  # gradients need numbers
    for actual, expected in zip(model.parameters(), stepped.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-7, atol=1e-9)


def test_threads_call_one_net_at_the_same_time() -> None:
    model, net, x_seq = made("linear", torch.float64)
    inputs = [x_seq * factor for factor in (0.7, 1.0, 1.3)]
    expected = [step_model(copy.deepcopy(model), x).detach() for x in inputs]
    warmed_up(net, x_seq)
    wrong: list[int] = []

    def call(k: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.allclose(net(inputs[k]), expected[k], rtol=1e-9, atol=1e-9):
                    wrong.append(k)

    threads = [threading.Thread(target=call, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def bits_of(x: Tensor, order: tuple[int, ...]) -> SpikeBits:
    bits = x.permute(0, *[d + 1 for d in order]).reshape(-1, 64).to(torch.int64)
    words = (bits << torch.arange(64)).sum(1)
    return SpikeBits(words, tuple(x.shape), order, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_bits_become_numbers(form: str, dtype: torch.dtype) -> None:
    x = (torch.rand(3, 2, 64, 5, 7) < 0.3).to(dtype)
    spikes = bits_of(x, FORMS[form])
    numbers = spikes.numbers()
    assert torch.equal(numbers, x) and numbers.dtype == dtype
    assert (numbers[0].stride(1) == 1) == (form == "channels-last")


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (1, 3), (1, 0)), ((5, 7), (1, 1), (2, 3))],
)
def test_a_max_pooling_of_bits_equals_that_of_numbers(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    x = (torch.rand(3, 2, 128, 9, 11) < 0.1).float()
    spikes = bits_of(x, FORMS["channels-last"])
    pooled = MaxPooling(spikes, kernel, stride, padding)(spikes).numbers()
    expected = functional.max_pool2d(x.flatten(0, 1), kernel, stride, padding).unflatten(0, (3, 2))
    assert torch.equal(pooled, expected)


def test_a_hook_on_a_pooling_fires() -> None:
    _, net, x_seq = made("flatten")
    warmed_up(net, x_seq)
    pool = net.get_submodule("2")
    shapes: list[torch.Size] = []
    handle = pool.register_forward_hook(lambda _, args, y: shapes.append(y.shape))
    with torch.no_grad():
        net(x_seq)
    handle.remove()
    assert shapes and shapes[0][1:] == (64, 8, 8)


def test_a_flattening_of_other_dimensions_is_seen(written: list[SpikeBits]) -> None:
    model, net, x_seq = made("flatten")
    warmed_up(net, x_seq)
    assert written
    written.clear()
    (flatten,) = (m for m in model.modules() if isinstance(m, nn.Flatten))
    flatten.end_dim = 2
    with torch.no_grad(), pytest.raises(RuntimeError):
        net(x_seq)  # the layer behind it takes other sizes
    assert not written
