"""Loops with products in one call of compiled code, against the model stepped in a plain loop in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron, surrogate
from snnfx.inspect.region_execution import how_region_will_run
from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.mixed import compiled_loop, gradient_by_events
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.region_modules import LoopRegion
from support.stepping import assert_converts, assert_same_run, run_net, run_stepped

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")


def mixed_of(net: Any) -> MixedStep:
    """The lowered step of the one loop with products."""
    loops = [module for module in net.snnfx_regions.modules() if isinstance(module, LoopRegion)]
    assert all(loop.kernels is not None and not loop.kernels.refusal for loop in loops)
    (step,) = [loop.kernels.in_use for loop in loops if isinstance(loop.kernels.in_use, MixedStep)]
    return step


def assert_compiled(net: Any) -> MixedStep:
    step = mixed_of(net)
    assert step.reason_for_python == ""
    return step


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled_loop, "_MIN_PARALLEL_WORK", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


class Feedback(snnfx.MemoryModule):
    """A layer whose states return through a matrix.

    Args:
        inputs, hidden: the sizes.
        activation: makes the output of a step from its sum.
        bias: whether the product has a bias.
    """

    def __init__(
        self, inputs: int, hidden: int, activation: Callable[[Tensor], Tensor] = torch.tanh, bias: bool = True
    ) -> None:
        super().__init__()
        self.up, self.back = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden, bias=bias)
        self.activation = activation
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = self.activation(x + self.back(self.h)) + 0.0 * x
        return self.h


class Recurrent(nn.Module):
    """LIF neurons whose spikes return; `gain` sets how many fire."""

    def __init__(self, hidden: int, gain: float = 1.0) -> None:
        super().__init__()
        self.up, self.back = nn.Linear(8, hidden), nn.Linear(hidden, hidden)
        self.lif = neuron.LIFNode(surrogate_function=surrogate.ATan())
        with torch.no_grad():
            self.up.weight.mul_(4 * gain)
        self.spike: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.spike is None:
            self.spike = torch.zeros_like(x)
        self.spike = self.lif(x + self.back(self.spike))
        return self.spike


class Reading(snnfx.MemoryModule):
    """Two loops sizes, and states that are read through slices and concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(13, 7), nn.Linear(5, 3, bias=False)
        self.register_memory("a", None)
        self.register_memory("b", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.a is None:
            self.a, self.b = x.new_zeros(x.shape[0], 7), x.new_zeros(x.shape[0], 3)
        joined = torch.cat((x, self.a, self.b), 1)
        self.a = torch.tanh(self.wide(joined))
        self.b = 0.5 * self.b + self.narrow(self.a[:, 1:6])
        return torch.cat((self.b, self.a), 1)


def relu_of(share: float) -> Callable[[Tensor], Tensor]:
    return lambda h: (h - share).clamp(0, 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": torch.tanh,
    "half are zero": relu_of(0.0),
    "few are not zero": relu_of(0.9),
    "zero": lambda h: h * 0.0,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [2, 15, 16, 17, 64, 65, 130])
def test_products_of_any_size_and_density(hidden: int, activation: str) -> None:
    for batch in (1, 2, 3, 5, 9, 16):
        model = Feedback(3, hidden, ACTIVATIONS[activation]).double()
        net = assert_converts(model, torch.randn(6, batch, 3, dtype=torch.float64), examples=True)
        assert_compiled(net)


@pytest.mark.parametrize("batch", [1, 4])
def test_one_neuron(batch: int) -> None:
    assert_converts(Feedback(3, 1).double(), torch.randn(6, batch, 3, dtype=torch.float64), examples=True)


def test_a_chunk_of_rows_is_followed_by_another() -> None:
    model = Feedback(3, 33, relu_of(0.5), bias=False).double()
    assert_compiled(assert_converts(model, torch.randn(4, 70, 3, dtype=torch.float64), examples=True))


@pytest.mark.parametrize("make", [lambda: Recurrent(70), lambda: Feedback(8, 70, relu_of(0.3))], ids=["LIF", "graded"])
@pytest.mark.parametrize("batch", [1, 6])
def test_float32_is_near_float64(make: Callable[[], nn.Module], batch: int) -> None:
    torch.manual_seed(3)
    model, x_seq = make(), torch.randn(12, batch, 8)
    expected = run_stepped(copy.deepcopy(model).double(), x_seq.double())
    net = snnfx.convert(model, example_inputs=x_seq[0])
    actual = run_net(net, x_seq)
    assert_compiled(net)
    torch.testing.assert_close(actual.outputs.double(), expected.outputs, rtol=1e-4, atol=1e-4)
    for name, gradient in expected.parameter_grads.items():
        found = actual.parameter_grads[name]
        torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("T", [1, 2, 17])
def test_slices_concatenations_and_two_products(T: int) -> None:
    assert_compiled(assert_converts(Reading().double(), torch.randn(T, 5, 3, dtype=torch.float64), examples=True))


def test_stacked_recurrent_layers() -> None:
    model = nn.Sequential(Recurrent(9), nn.Linear(9, 8), Recurrent(6), nn.Linear(6, 2)).double()
    x_seq = torch.randn(7, 4, 8, dtype=torch.float64)
    net = assert_converts(model, x_seq, examples=True)
    assert all("products included" in note for note in snnfx.explain(net).kernels)


def test_a_bias_of_each_sample() -> None:
    class Own(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.of_sample = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 4))
            self.one = nn.Parameter(torch.randn(1))
            self.register_memory("h", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = torch.zeros_like(x)
            self.h = torch.addmm(self.of_sample.t(), self.h, self.w).sin() + torch.addmm(self.one, x, self.w.t())
            return self.h

    assert_compiled(assert_converts(Own().double(), torch.randn(5, 4, 5, dtype=torch.float64), examples=True))


@pytest.mark.parametrize("batch", [1, 6, 16, 23])
def test_events_give_the_bits_of_the_dense_loop(batch: int) -> None:
    x_seq = torch.randn(20, batch, 8)
    torch.manual_seed(1)
    for model in (Recurrent(100), Feedback(8, 100, relu_of(0.6))):
        nets = [
            snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0], lower=lower) for lower in ("auto", "dense")
        ]
        by_events, dense = (net(x_seq) for net in nets)
        assert torch.equal(by_events, dense)
        density = mixed_of(nets[0]).density
        assert density is not None and 0.0 < density < 0.5
        assert mixed_of(nets[1]).density is None


def test_a_weight_that_is_not_finite_reaches_all_outputs() -> None:
    model = Feedback(3, 20, relu_of(0.9)).double()
    with torch.no_grad():
        model.back.weight[4, 7] = float("inf")
    x_seq = torch.randn(3, 2, 3, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    expected = run_stepped(model, x_seq).outputs
    assert expected.isnan().any()
    torch.testing.assert_close(net(x_seq), expected, equal_nan=True)


def test_a_state_that_is_not_finite_reaches_all_outputs() -> None:
    model = Feedback(3, 20, relu_of(0.9)).double()
    x_seq = torch.randn(3, 2, 3, dtype=torch.float64)
    x_seq[1, 0, 2], x_seq[1, 1, 0] = float("nan"), float("inf")
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.testing.assert_close(net(x_seq), run_stepped(model, x_seq).outputs, equal_nan=True)


def test_changed_weights_are_packed_again() -> None:
    model = Recurrent(40).double()
    x_seq = torch.randn(6, 3, 8, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    changes: list[Callable[[], Any]] = [
        lambda: model.back.weight.data.mul_(-1.5),
        lambda: model.back.bias.data.add_(0.2),
        lambda: setattr(model.back, "weight", nn.Parameter(model.back.weight.detach().t().contiguous().t() * 0.5)),
    ]
    for change in (lambda: None, *changes):
        change()
        with torch.no_grad():
            torch.testing.assert_close(net(x_seq), run_stepped(model, x_seq).outputs.detach())
        assert_same_run(run_net(net, x_seq), run_stepped(model, x_seq))
    assert_compiled(net)


@pytest.mark.parametrize("name", ["transposed", "every second", "expanded"])
def test_inputs_that_are_not_contiguous(name: str) -> None:
    x_seq = {
        "transposed": torch.randn(3, 4, 6, dtype=torch.float64).permute(2, 1, 0),
        "every second": torch.randn(12, 8, 6, dtype=torch.float64)[::2, ::2, ::2],
        "expanded": torch.randn(1, 4, 3, dtype=torch.float64).expand(6, 4, 3),
    }[name]
    for model in (Reading().double(), Feedback(3, 5).double()):
        net = snnfx.convert(model, example_inputs=x_seq[0].contiguous())
        leaves = [x_seq.detach().requires_grad_(), *model.parameters()]
        actual = net(leaves[0])
        expected = snnfx.convert(model, lower=None)(leaves[0])
        torch.testing.assert_close(actual, expected)
        found, wanted = (torch.autograd.grad(y.sum(), leaves) for y in (actual, expected))  # an expanded gradient
        torch.testing.assert_close(found, wanted)
        assert_compiled(net)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 40])
def test_threads_share_the_samples(batch: int, three_threads: None) -> None:
    for model in (Feedback(3, 50, relu_of(0.3)), Reading(), nn.Sequential(nn.Linear(3, 8), Recurrent(600))):
        assert_compiled(assert_converts(model.double(), torch.randn(5, batch, 3, dtype=torch.float64), examples=True))


class Square(snnfx.MemoryModule):
    """Reads the states of other samples: as many samples as neurons."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.back, self.read = nn.Linear(6, 6), read
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = torch.tanh(x + self.back(self.h) + self.read(self.h))
        return self.h


@pytest.mark.parametrize(
    "read",
    [lambda h: h.t(), lambda h: h[:1], lambda h: h[0].expand(6, 6), lambda h: torch.cat((h[2:], h[:2]))],
    ids=["transposed", "first row", "one row", "rows in another order"],
)
def test_samples_that_read_each_other_are_in_one_part(read: Callable[[Tensor], Tensor], three_threads: None) -> None:
    for _ in range(5):
        assert_converts(Square(read).double(), torch.randn(40, 6, 6, dtype=torch.float64), examples=True)


@pytest.mark.parametrize("batch", [2, 5])
def test_the_weight_gradient_skips_zeros(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_by_events, "_LEAST_WORK", 0)
    used: list[bool] = []
    original = gradient_by_events._product
    monkeypatch.setattr(gradient_by_events, "_product", lambda *a: used.append(True) or original(*a))
    for model in (Recurrent(70, 0.5), Feedback(8, 33, relu_of(1.2))):
        assert_converts(model.double(), torch.randn(9, batch, 8, dtype=torch.float64), examples=True)
    assert used
    used.clear()
    assert_converts(Feedback(8, 33).double(), torch.randn(9, batch, 8, dtype=torch.float64), examples=True)
    assert_converts(Recurrent(70, 0.5).double(), torch.randn(9, batch, 8, dtype=torch.float64), lower="dense")
    assert not used


class Cell(snnfx.MemoryModule):
    """A recurrent cell of PyTorch with its states."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.register_memory("h", None)
        self.register_memory("c", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = self.c = x.new_zeros(x.shape[0], 6)
        if isinstance(self.cell, nn.LSTMCell):
            self.h, self.c = self.cell(x, (self.h, self.c))
        else:
            self.h = self.cell(x, self.h)
        return self.h


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_of_pytorch(kind: Callable[..., nn.Module], bias: bool) -> None:
    for T, batch in ((1, 1), (5, 1), (6, 3)):
        model = Cell(kind(4, 6, bias=bias)).double()
        assert_compiled(assert_converts(model, torch.randn(T, batch, 4, dtype=torch.float64), examples=True))


@pytest.mark.parametrize("options", [{}, {"learn_threshold": True}, {"reset_mechanism": "subtract"}])
@pytest.mark.parametrize("batch", [1, 3])
def test_slstm_of_snntorch(options: dict[str, Any], batch: int) -> None:
    snntorch = pytest.importorskip("snntorch")
    cell = snntorch.SLSTM(6, 6, threshold=0.1, init_hidden=True, spike_grad=surrogate.ATan(), **options)
    model = nn.Sequential(nn.Linear(4, 6), cell, nn.Linear(6, 2)).double()
    # The cell creates its first states in the default dtype.
    torch.set_default_dtype(torch.float64)
    try:
        net = assert_converts(model, torch.randn(5, batch, 4, dtype=torch.float64), examples=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_compiled(net)


def test_an_operand_for_one_sample_is_read_by_a_kernel() -> None:
    class Learnt(Feedback):
        def __init__(self) -> None:
            super().__init__(3, 5)
            self.term = nn.Parameter(torch.rand(1, 5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.term.exp() + self.term

    for batch in (1, 3):
        assert_compiled(assert_converts(Learnt().double(), torch.randn(4, batch, 3).double(), examples=True))


def test_other_dtypes_are_left_to_pytorch() -> None:
    model = Feedback(3, 5).bfloat16()
    x_seq = torch.randn(4, 2, 3).bfloat16()
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.testing.assert_close(net(x_seq), snnfx.convert(model, lower=None)(x_seq), rtol=0.05, atol=0.05)
    assert mixed_of(net).reason_for_python == "its products are computed in bfloat16"


class Summed(snnfx.MemoryModule):
    """A layer whose state returns through a product and a call that PyTorch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Linear(5, 5)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = torch.tanh(x + self.back(self.h).cumsum(1))
        return self.h


def test_explain_names_the_operator_that_keeps_python_in_the_loop() -> None:
    x_seq = torch.randn(4, 3, 5)
    net = snnfx.convert(Summed(), example_inputs=x_seq[0])
    (before,) = snnfx.explain(net).kernels
    net(x_seq)
    (after,) = snnfx.explain(net).kernels
    for note in (before, after):
        assert note.startswith("Stepped with element-wise kernels")
        assert "because PyTorch computes `cumsum` in each step" in note


@pytest.mark.parametrize(
    ("make", "shape", "way"),
    [(lambda: Recurrent(5), (3, 8), "kernel"), (Summed, (3, 5), "stepped, with kernels")],
)
def test_the_way_is_known_before_the_first_call(make: Callable[[], nn.Module], shape: Any, way: str) -> None:
    net = snnfx.convert(make(), example_inputs=torch.randn(shape))
    (region,) = [region for region in net.program.regions if region.kind == "loop"]
    for _ in range(2):
        module = net.region_modules()[region.name]
        assert how_region_will_run(net.program, region, module, torch.device("cpu")) == way
        net(torch.randn(4, *shape))


def test_explain_gives_the_density() -> None:
    net = snnfx.convert(Recurrent(40), example_inputs=torch.randn(3, 8))
    with torch.no_grad():
        net(torch.randn(9, 3, 8))
    (note,) = snnfx.explain(net).kernels
    density = mixed_of(net).density
    assert density is not None
    expected = f"loop_1; {density:.1%} of the inputs of its products were not zero."
    assert note == f"One kernel for all time steps, products included: {expected}"


def test_the_density_is_that_of_the_spikes() -> None:
    torch.manual_seed(0)
    model, x_seq = Recurrent(40).double(), torch.randn(9, 3, 8, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    spikes = net(x_seq).detach()
    assert mixed_of(net).density == pytest.approx(float(spikes[:-1].sum() / spikes.numel()))


def test_one_library_serves_all_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    for hidden, batch, T in ((5, 1, 3), (70, 4, 2)):
        net = snnfx.convert(Feedback(3, hidden), example_inputs=torch.randn(batch, 3))
        with torch.no_grad():
            net(torch.randn(T, batch, 3))
        assert_compiled(net)
    assert len(list(tmp_path.glob("*.so"))) == 2  # the loop, and the fused kernel of both steps
    built = []
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_build", lambda *arguments: built.append(arguments))
    with torch.no_grad():
        net(torch.randn(2, 4, 3))
    assert not built
