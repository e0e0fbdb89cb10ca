"""Convolutions in compiled loops, against the model stepped in a plain loop in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron, surrogate
from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.mixed import compiled_loop, convolution_calls
from snnfx.lowering.mixed.compiled_loop import CompiledLoop
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.lowering.mixed.operations import Call, Convolution
from snnfx.lowering.mixed.ring_buffers import RingBuffer
from snnfx.regions.region_modules import LoopRegion
from support.stepping import assert_converts, assert_same, assert_same_run, fresh_copy, run_net, run_stepped, step_model

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")


def mixed_of(net: Any) -> MixedStep:
    """The lowered step of the one loop with products."""
    kernels = [module.kernels for module in net.snnfx_regions.modules() if isinstance(module, LoopRegion)]
    (step,) = [k.in_use for k in kernels if k is not None and isinstance(k.in_use, MixedStep)]
    return step


def reasons(step: MixedStep) -> list[str | None]:
    """Why Python code ran the steps of each pass."""
    return [schedule.reason_for_python for schedule in step._schedules()]


def assert_compiled(model: nn.Module, *shape: int, seed: int = 0) -> None:
    """Both passes of the converted model run in compiled loops and equal stepping, with and without gradients."""
    torch.manual_seed(seed)
    x_seq = torch.randn(shape, dtype=torch.float64)
    net = assert_converts(model.double(), x_seq, examples=True)
    step = mixed_of(net)
    assert set(reasons(step)) == {""} and len(step._training) == 1
    with torch.no_grad():
        assert_same(net(x_seq), step_model(fresh_copy(model), x_seq))


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled_loop, "_MIN_PARALLEL_WORK", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


class Convolving(snnfx.MemoryModule):
    """A state that returns through layers that keep its shape."""

    def __init__(self, *back: nn.Module) -> None:
        super().__init__()
        self.back = nn.Sequential(*back)
        self.gain = nn.Parameter(torch.rand(()) + 0.5)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = torch.tanh(self.gain * x + self.back(self.h))
        return self.h


Layers = Callable[[], tuple[nn.Module, ...]]

SETTINGS: dict[str, tuple[Layers, tuple[int, ...]]] = {
    "1 x 1": (lambda: (nn.Conv2d(5, 5, 1),), (5, 3, 4)),
    "3 x 3": (lambda: (nn.Conv2d(3, 3, 3, padding=1),), (3, 6, 5)),
    "no bias": (lambda: (nn.Conv2d(3, 3, 3, padding=1, bias=False),), (3, 6, 5)),
    "wide rows": (lambda: (nn.Conv2d(9, 9, 3, padding=1),), (9, 4, 19)),
    "rows of whole vectors": (lambda: (nn.Conv2d(13, 13, 3, padding=1),), (13, 5, 16)),
    "same": (lambda: (nn.Conv2d(2, 2, 5, padding="same"),), (2, 7, 6)),
    "one row, one column": (
        lambda: (nn.Conv2d(2, 2, (3, 1), padding=(1, 0)), nn.Conv2d(2, 2, 3, padding=1)),
        (2, 1, 1),
    ),
    "unequal kernel": (lambda: (nn.Conv2d(4, 4, (1, 5), padding=(0, 2)),), (4, 3, 9)),
    "dilation": (lambda: (nn.Conv2d(4, 4, 3, padding=(2, 3), dilation=(2, 3)),), (4, 7, 8)),
    "groups": (lambda: (nn.Conv2d(6, 6, 3, padding=1, groups=3),), (6, 5, 5)),
    "depthwise": (lambda: (nn.Conv2d(11, 11, 3, padding=1, groups=11), nn.Conv2d(11, 11, 1)), (11, 5, 9)),
    "groups that multiply channels": (
        lambda: (nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 3, 1, groups=3)),
        (3, 5, 5),
    ),
    "padding beyond the kernel": (lambda: (nn.Conv2d(2, 2, 1, padding=2), nn.Conv2d(2, 2, 5)), (2, 6, 5)),
    "down and up": (
        lambda: (nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ConvTranspose2d(5, 3, 4, stride=2, padding=1)),
        (3, 8, 6),
    ),
    "stride with a rest, output padding": (
        lambda: (
            nn.Conv2d(2, 4, (3, 2), stride=(3, 2)),
            nn.ConvTranspose2d(4, 2, (2, 3), stride=(3, 2), output_padding=(2, 0)),
        ),
        (2, 10, 9),
    ),
    "stride beyond the kernel": (
        lambda: (nn.Conv2d(2, 3, 1, stride=3), nn.ConvTranspose2d(3, 2, 1, stride=3, output_padding=1)),
        (2, 8, 5),
    ),
    "transposed, groups and dilation": (
        lambda: (
            nn.ConvTranspose2d(4, 6, 3, dilation=2, groups=2),
            nn.Conv2d(6, 4, 5, groups=2),
        ),
        (4, 6, 7),
    ),
    "one dimension": (lambda: (nn.Conv1d(3, 3, 3, padding=1),), (3, 7)),
    "one long dimension": (
        lambda: (nn.Conv1d(3, 4, 4, stride=2, padding=1), nn.ConvTranspose1d(4, 3, 2, stride=2)),
        (3, 50),
    ),
    "three dimensions": (
        lambda: (nn.Conv3d(2, 3, 3, (1, 2, 1), (1, 0, 1)), nn.ConvTranspose3d(3, 2, (3, 3, 3), (1, 2, 1), (1, 0, 1))),
        (2, 4, 5, 3),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    make, shape = SETTINGS[name]
    for T, N in ((1, 2), (5, 1), (4, 3)):
        assert_compiled(Convolving(*make()), T, N, *shape)


@pytest.mark.parametrize("channels", [1, 2, 4, 7, 8, 9, 15, 23])
def test_numbers_of_channels(channels: int) -> None:
    assert_compiled(Convolving(nn.Conv2d(channels, channels, 3, padding=1)), 3, 2, channels, 5, 6)


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 15, 16, 17, 24, 33])
def test_widths(width: int) -> None:
    assert_compiled(Convolving(nn.Conv2d(3, 3, 3, padding=1)), 3, 2, 3, 3, width)


class Spiking(nn.Module):
    """LIF neurons whose spikes return through a convolution."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.up, self.back = nn.Conv2d(2, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.lif = neuron.LIFNode(surrogate_function=surrogate.ATan())
        self.spike: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x) * 3
        if self.spike is None:
            self.spike = torch.zeros_like(x)
        self.spike = self.lif(x + self.back(self.spike))
        return self.spike


class ConvLSTM(snnfx.MemoryModule):
    """Gates from a convolution of the input and the state, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(5, 12, 3, padding=1)
        self.register_memory("h", None)
        self.register_memory("c", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = x.new_zeros(x.shape[0], 3, *x.shape[2:])
            self.c = torch.zeros_like(self.h)
        i, f, g, o = self.gates(torch.cat((x, self.h), 1)).chunk(4, 1)
        self.c = torch.sigmoid(f) * self.c + torch.sigmoid(i) * torch.tanh(g)
        self.h = torch.sigmoid(o) * torch.tanh(self.c)
        return self.h


MODELS: dict[str, Callable[[], nn.Module]] = {"spiking": Spiking, "ConvLSTM": ConvLSTM}


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, T: int) -> None:
    for N in (1, 3):
        assert_compiled(MODELS[name](), T, N, 2, 6, 5)


@pytest.mark.parametrize("name", ["SConv2dLSTM", "RLeaky", "RSynaptic"])
def test_convolutional_cells_of_snntorch(name: str) -> None:
    snntorch = pytest.importorskip("snntorch")
    options: dict[str, Any] = {"init_hidden": True, "spike_grad": surrogate.ATan()}
    if name == "SConv2dLSTM":
        cell = snntorch.SConv2dLSTM(2, 2, 3, **options)
    else:
        more = {"alpha": 0.8} if name == "RSynaptic" else {}
        cell = getattr(snntorch, name)(beta=0.9, conv2d_channels=2, kernel_size=3, **more, **options)
    layer = nn.Conv2d(2, 2, 1)
    assert_compiled(nn.Sequential(layer, cell), 5, 3, 2, 6, 5)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_any_batch(batch: int) -> None:
    x_seq = torch.randn(4, batch, 2, 5, 4, dtype=torch.float64)
    assert_converts(Spiking().double(), x_seq, examples=True)


def test_float32_is_near_float64() -> None:
    model = Convolving(nn.Conv2d(17, 17, 3, padding=1))
    x_seq = torch.randn(6, 3, 17, 18, 18)
    net = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0])
    actual, expected = net(x_seq), step_model(model.double(), x_seq.double())
    assert_same(actual.double(), expected, tolerance=1e-5)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
    found = torch.autograd.grad(actual.sum(), list(net.parameters()))
    for a, e in zip(found, wanted, strict=True):
        assert_same(a.double() / e.abs().max(), e / e.abs().max(), tolerance=1e-4)
    assert set(reasons(mixed_of(net))) == {""}


@pytest.mark.parametrize("batch", [2, 5])
def test_threads_share_the_samples(batch: int, three_threads: None) -> None:
    for make in (lambda: Spiking(), lambda: ConvLSTM()):
        assert_compiled(make(), 6, batch, 2, 6, 17)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
    "turned": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "negated": lambda x: torch.complex(x, -x).conj().imag,
    "expanded": lambda x: x[:, :, :, :1].expand(x.shape),
    "time behind": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


class ReadsInput(snnfx.MemoryModule):
    """The convolution in the loop reads a product of the input and the state, or only the input."""

    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Conv2d(3, 3, 3, padding=1)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = torch.tanh(self.back(self.h.mT.flip(2).mT * x) + x)
        return self.h


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [ReadsInput, lambda: Convolving(nn.Conv2d(3, 3, 3, padding=1))])
def test_inputs_in_other_layouts(layout: str, make: Callable[[], nn.Module]) -> None:
    model = make().double()
    x_seq = LAYOUTS[layout](torch.randn(4, 2, 3, 4, 4, dtype=torch.float64))
    assert_converts(model, x_seq, examples=True)


class Turned(snnfx.MemoryModule):
    """The convolution reads the state through views whose rows are not consecutive."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.part = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=(1, 2))
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = torch.tanh(x + self.back(self.h.mT).mT + self.part(self.h[:, 1:, :, 1:4]))
        return self.h


def test_views_of_a_state_are_read_in_place() -> None:
    assert_compiled(Turned(), 4, 3, 3, 5, 5)


@pytest.mark.parametrize("kind", ["channels last", "turned"])
def test_weights_in_other_layouts(kind: str) -> None:
    model = Convolving(nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 3, 3, padding=1)).double()
    for layer in model.back:
        weight = layer.weight.data  # type: ignore[union-attr]
        changed = weight.contiguous(memory_format=torch.channels_last) if kind == "channels last" else weight.mT
        layer.weight.data = changed  # type: ignore[union-attr]
    assert_compiled(model, 4, 2, 3, 5, 6)


def test_changed_weights_are_read_at_the_next_call() -> None:
    model = Convolving(nn.Conv2d(3, 3, 3, padding=1)).double()
    x_seq = torch.randn(4, 2, 3, 5, 6, dtype=torch.float64)
    net = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0])
    for _ in range(4):
        assert_same_run(run_net(net, x_seq), run_stepped(model, x_seq))
        with torch.no_grad():
            for target in (model, net):
                for p in target.parameters():
                    p.mul_(1.25)


def test_padding_stays_zero_after_values_that_are_not_finite() -> None:
    model = Convolving(nn.Conv2d(2, 2, 3, padding=1)).double()
    net = snnfx.convert(copy.deepcopy(model), example_inputs=torch.zeros(1, 2, 4, 5).double())
    x_seq = torch.randn(4, 1, 2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for spoiled in (False, True, False, False):
            given = x_seq * float("nan") if spoiled else x_seq
            expected = step_model(fresh_copy(model), given)
            torch.testing.assert_close(net(given), expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_frozen_weights_and_gradients_of_inputs() -> None:
    model = Convolving(nn.Conv2d(2, 2, 3, padding=1)).double()
    model.requires_grad_(False)
    x_seq = torch.randn(4, 3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    net = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0].detach())
    (expected,) = torch.autograd.grad(step_model(fresh_copy(model), x_seq).cos().sum(), x_seq)
    for _ in range(3):
        (actual,) = torch.autograd.grad(net(x_seq).cos().sum(), x_seq)
        assert_same(actual, expected)


def test_initial_and_final_states_have_gradients() -> None:
    model = Convolving(nn.Conv2d(2, 2, 3, padding=1)).double()
    net = snnfx.convert(copy.deepcopy(model), example_inputs=torch.rand(3, 2, 4, 5).double())
    x_seq, h = torch.randn(6, 3, 2, 4, 5, dtype=torch.float64), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    leaves = [x_seq.requires_grad_(), h.requires_grad_()]
    ys = [h]
    for x in x_seq:
        ys.append(torch.tanh(model.gain * x + model.back(ys[-1])))
    expected = torch.stack(ys[1:])
    actual, final = net.run(x_seq, state={"h": h})
    assert_same(actual, expected)
    for of_run, of_loop in ((actual, expected), (final["h"], ys[-1])):
        wanted = torch.autograd.grad(of_loop.cos().sum(), [*leaves, *model.parameters()], retain_graph=True)
        found = torch.autograd.grad(of_run.cos().sum(), [*leaves, *net.parameters()], retain_graph=True)
        assert_same(found, wanted)


def test_calls_may_run_before_the_backward_passes_of_earlier_calls() -> None:
    model = Convolving(nn.Conv2d(2, 2, 3, padding=1)).double()
    x_seq = torch.randn(3, 2, 2, 4, 5, dtype=torch.float64)
    net = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0])
    inputs = [x_seq * k for k in (1, -2, 3, 0.5)]
    results = [net(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        clone = fresh_copy(model)
        expected = step_model(clone, x)
        assert_same(y, expected)
        wanted = torch.autograd.grad(expected.cos().sum(), list(clone.parameters()))
        assert_same(torch.autograd.grad(y.cos().sum(), list(net.parameters())), wanted)


def test_two_threads_share_no_extended_image() -> None:
    model = Convolving(nn.Conv2d(2, 2, 3, padding=1)).double()
    inputs = [torch.randn(50, 2, 2, 4, 5, dtype=torch.float64) for _ in range(2)]
    net = snnfx.convert(copy.deepcopy(model), example_inputs=inputs[0][0])
    expected = [step_model(fresh_copy(model), x).detach() for x in inputs]

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [net.run(x)[0] for _ in range(30)]

    with ThreadPoolExecutor(2) as threads:
        for found, y_seq in zip(threads.map(run, inputs), expected, strict=True):
            for y in found:
                assert_same(y, y_seq)


@pytest.mark.parametrize("limit", ["_LARGEST_WORK", "_LARGEST_WEIGHT"])
def test_large_convolutions_are_left_to_pytorch(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_calls, limit, 10)
    x_seq = torch.randn(4, 2, 2, 6, 5, dtype=torch.float64)
    net = assert_converts(Spiking().double(), x_seq, examples=True)
    assert "PyTorch computes `convolution` in each step" in reasons(mixed_of(net))
    assert any("because PyTorch computes `convolution`" in note for note in snnfx.explain(net).kernels)


def test_one_sample_on_several_threads_is_left_to_pytorch_if_it_is_much_work() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        is_faster = convolution_calls._is_faster_in_loop
        assert is_faster(1 << 20, 1000, 1) and is_faster(1 << 24, 1000, 4)
        assert not is_faster(1 << 24, 1000, 1) and not is_faster(1 << 24, 1000, 5)
    finally:
        torch.set_num_threads(threads)


class OwnWeights(snnfx.MemoryModule):
    """The weight of the convolution changes in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 2, 3, 3))
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        back = torch.nn.functional.conv2d(self.h, self.weight * self.h.mean(), padding=1)
        self.h = torch.tanh(x + back)
        return self.h


def test_a_weight_that_changes_in_each_step_is_left_to_pytorch() -> None:
    x_seq = torch.randn(4, 1, 2, 6, 5, dtype=torch.float64)
    assert_converts(OwnWeights().double(), x_seq, examples=True)


def _up_to(most: int, dims: int, least: int = 1) -> list[int]:
    return torch.randint(least, most + 1, (dims,)).tolist()


@pytest.mark.parametrize("seed", range(60))
def test_random_geometries_forward_and_backward(seed: int) -> None:
    torch.manual_seed(seed)
    dims, groups, is_transposed = 1 + seed % 3, 1 + seed % 2, seed % 4 > 1
    inputs, outputs = (groups * n for n in _up_to(9, 2))
    kernel, stride, dilation = _up_to(3, dims), _up_to(3, dims), _up_to(3, dims)
    padding, size = _up_to(2, dims, 0), _up_to(12 if dims < 3 else 4, dims, 8 if dims < 3 else 4)
    shape = (inputs, outputs // groups, *kernel) if is_transposed else (outputs, inputs // groups, *kernel)
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)
    rest = (stride, padding, dilation, is_transposed, [0] * dims, groups)
    if is_transposed:
        size = [n + 4 for n in size]
    x = torch.randn(2, 3, inputs, *size, dtype=torch.float64)
    y = torch.stack([torch.ops.aten.convolution(x_t, weight, bias, *rest) for x_t in x])
    grad = torch.randn_like(y)
    mask = [True, False, False]
    wanted = [
        torch.ops.aten.convolution_backward(g, x_t, weight, None, *rest, mask)[0]
        for g, x_t in zip(grad, x, strict=True)
    ]
    settings = (weight.shape, stride, padding, dilation, groups)
    forward = convolution_calls._settings(*settings, is_transposed, is_transposed)
    backward = convolution_calls._settings(*settings, not is_transposed, not is_transposed)
    assert_same(convolved(x, weight, bias, forward, y), y)
    assert_same(convolved(grad, weight, None, backward, x), torch.stack(wanted))


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any, like: Tensor) -> Tensor:
    """The results of two iterations of a compiled loop of one convolution."""
    out, rows = torch.full_like(like, float("nan")), torch.arange(2)
    rings = RingBuffer(x, rows), RingBuffer(out, rows)
    by_pytorch = Call("convolution", [rings[0]], lambda values, targets: None, [rings[1]])
    operation = Convolution(rings[0], weight, bias, settings, rings[1], by_pytorch)
    CompiledLoop([operation], 2, by_events=False).run()
    return out
