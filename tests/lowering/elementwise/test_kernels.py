"""Generated kernels against the loop of single steps that they stand for, which PyTorch runs (`lower=None`)."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import snnfx
from snnfx import neuron, surrogate
from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.ops.buffer_pool import BufferPool
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.region_modules import LoopRegion

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
pytestmark = needs_compiler


def loops_of(net: Any) -> list[LoopRegion]:
    return [m for m in net.region_modules().values() if isinstance(m, LoopRegion)]


def kernels_of(net: Any) -> list[RegionKernels]:
    return [loop.kernels for loop in loops_of(net) if loop.kernels is not None]


def assert_used(net: Any) -> None:
    """All loops of a net ran as kernels."""
    assert all(kernels.in_use is not None for kernels in kernels_of(net)), [k.refusal for k in kernels_of(net)]
    assert len(kernels_of(net)) == len(loops_of(net)) > 0


def results(net: Any, x_seq: Tensor, state: Any = None, seed: int = 1) -> tuple[Any, list[Any]]:
    """Outputs and final states, and the gradients of everything with random gradients from above."""
    x_seq = x_seq.detach().clone().requires_grad_()
    given_state = None if state is None else {k: v.detach().clone().requires_grad_() for k, v in state.items()}
    y_seq, final = net.run(x_seq, state=given_state)
    found = [y_seq, *final.values()]
    generator = torch.Generator().manual_seed(seed)
    roots = [value for value in found if value.requires_grad]
    above = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) for value in roots]
    leaves = [x_seq, *(given_state or {}).values(), *[p for p in net.parameters() if p.requires_grad]]
    gradients = torch.autograd.grad(roots, leaves, above, allow_unused=True)
    return [value.detach() for value in found], list(gradients)


def assert_close(actual: list[Any], expected: list[Any], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        if e is None:
            assert a is None or not a.any()
            continue
        assert a.shape == e.shape and a.dtype == e.dtype
        scale = max(1.0, float(e.abs().max())) if e.numel() and e.dtype != torch.bool else 1.0
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def assert_same_as_steps(
    model: nn.Module, x_seq: Tensor, tolerance: float = 1e-12, state: Any = None, **options: Any
) -> snnfx.Net:
    net = snnfx.convert(model, **options)
    stepped = snnfx.convert(model, lower=None, **options)
    actual, expected = results(net, x_seq, state), results(stepped, x_seq, state)
    assert_used(net)
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], tolerance)
    return net


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype) + 0.5


ZOO: dict[str, Callable[[], nn.Module]] = {
    "IF": neuron.IFNode,
    "IF soft": lambda: neuron.IFNode(v_reset=None),
    "LIF": neuron.LIFNode,
    "LIF soft, no decay of the input": lambda: neuron.LIFNode(tau=3.0, v_reset=None, decay_input=False),
    "LIF detached": lambda: neuron.LIFNode(v_reset=-0.2, detach_reset=True),
    "PLIF": neuron.ParametricLIFNode,
    "adaptive": neuron.AdaptiveLIFNode,
    "CUBA": neuron.CUBALIFNode,
    "integrator": neuron.LeakyIntegrator,
}


@pytest.mark.parametrize("name", ZOO)
def test_neurons_of_the_zoo(name: str) -> None:
    assert_same_as_steps(nn.Sequential(ZOO[name]()).double(), x_of(7, 5, 3))


@pytest.mark.parametrize("name", ["LIF", "PLIF", "adaptive"])
def test_gradient_of_the_initial_state(name: str) -> None:
    model = nn.Sequential(ZOO[name]()).double()
    slots = [slot.name for slot in snnfx.convert(model).program.slots]
    assert_same_as_steps(model, x_of(4, 5, 3), state={slot: x_of(5, 3) for slot in slots})


SURROGATES = [
    surrogate.Sigmoid(),
    surrogate.ATan(),
    surrogate.SoftSign(),
    surrogate.SuperSpike(),
    surrogate.FastSigmoid(),
    surrogate.Erf(),
    surrogate.PiecewiseExp(),
    surrogate.MultiGaussian(),
    surrogate.PiecewiseQuadratic(),
    surrogate.Triangle(),
    surrogate.Rectangle(),
    surrogate.PiecewiseLeakyReLU(),
    surrogate.LeakyKReLU(),
]


@pytest.mark.parametrize("spike", SURROGATES, ids=lambda s: type(s).__name__)
def test_every_surrogate_brings_its_derivative(spike: nn.Module) -> None:
    assert_same_as_steps(nn.Sequential(neuron.LIFNode(surrogate_function=spike)), x_of(6, 4, 3))


@pytest.mark.parametrize("spike", [surrogate.Sigmoid(spiking=False), surrogate.ATan(spiking=False)])
def test_smooth_neurons_pass_gradcheck(spike: nn.Module) -> None:
    net = snnfx.convert(nn.Sequential(neuron.ParametricLIFNode(surrogate_function=spike)).double())
    w = net.source[0].w  # type: ignore[index]

    def run(x_seq: Tensor, v: Tensor, w: Tensor) -> Any:
        y_seq, state = net.run(x_seq, state={"0.v": v})
        return y_seq, state["0.v"]

    inputs = (x_of(5, 2, 3).requires_grad_(), x_of(2, 3).requires_grad_(), w)
    assert torch.autograd.gradcheck(run, inputs)
    assert_used(net)


# -- other libraries -------------------------------------------------------------------------------------------------

SPIKINGJELLY = "IFNode LIFNode ParametricLIFNode QIFNode EIFNode IzhikevichNode KLIFNode CUBALIFNode".split()


@pytest.mark.parametrize("name", SPIKINGJELLY)
def test_neurons_of_spikingjelly(name: str) -> None:
    module = pytest.importorskip("spikingjelly.activation_based.neuron")
    assert_same_as_steps(nn.Sequential(getattr(module, name)()).double(), x_of(6, 4, 3))


SJ_SURROGATES = "ATan Erf LeakyKReLU NonzeroSignLogAbs PiecewiseExp PiecewiseLeakyReLU PiecewiseQuadratic QPseudoSpike "
SJ_SURROGATES += "Rect S2NN Sigmoid SoftSign SuperSpike DeterministicPass FakeNumericalGradient"


@pytest.mark.parametrize("name", SJ_SURROGATES.split())
def test_surrogates_of_spikingjelly(name: str) -> None:
    module = pytest.importorskip("spikingjelly.activation_based.neuron")
    from spikingjelly.activation_based import surrogate as sj_surrogate

    spike = getattr(sj_surrogate, name)()
    assert_same_as_steps(nn.Sequential(module.LIFNode(surrogate_function=spike)), x_of(5, 3, 2))


SNNTORCH: dict[str, dict[str, Any]] = {
    "Leaky": {"beta": 0.8},
    "Leaky, zero": {"beta": 0.8, "reset_mechanism": "zero"},
    "Leaky, none": {"beta": 0.8, "reset_mechanism": "none"},
    "Leaky, learnt": {"beta": torch.tensor([0.3, 0.6, 0.9]), "learn_beta": True, "learn_threshold": True},
    "Synaptic": {"alpha": 0.7, "beta": 0.8},
    "Alpha": {"alpha": 0.9, "beta": 0.8},
    "Lapicque": {"beta": 0.5},
}


@pytest.mark.parametrize("name", SNNTORCH)
def test_neurons_of_snntorch(name: str) -> None:
    snntorch = pytest.importorskip("snntorch")
    module = getattr(snntorch, name.partition(",")[0])(init_hidden=True, **SNNTORCH[name])
    # Their spikes are float32 whatever the input is, and so are the sums of gradients that go through them.
    assert_same_as_steps(nn.Sequential(module).double(), x_of(6, 4, 3), 1e-12 if "learnt" not in name else 1e-6)


@pytest.mark.parametrize("name", "LIFCell LICell LIFBoxCell IAFCell LIFAdExCell".split())
def test_cells_of_norse(name: str) -> None:
    norse = pytest.importorskip("norse.torch")

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(norse, name)()

        def forward(self, x: Tensor, state: Any = None) -> Any:
            return self.cell(x, state)

    # The first step of a stepped cell computes with float32 parameters, before its state is float64.
    assert_same_as_steps(Cell(), x_of(6, 4, 3) * 2, 1e-12 if name != "LIFAdExCell" else 1e-9, carry={"state": 1})


# -- users' own modules ----------------------------------------------------------------------------------------------


class PerChannel(snnfx.MemoryModule):
    """A leak for each channel, a softplus in the way, a reset by selection."""

    def __init__(self) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.rand(3, 1, 1))
        self.register_memory("v", 0.0)
        self.spike = surrogate.ATan()

    def forward(self, x: Tensor) -> Tensor:
        self.v = nn.functional.softplus(self.v + 0 * x) * self.leak + torch.tanh(x)
        spike = self.spike(self.v - 1.0)
        self.v = torch.where(spike > 0.5, self.v * 0.1, self.v)
        return spike


class PlainAttribute(nn.Module):
    """State in an attribute that nobody declared, created by the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(3))
        self.v: Any = None
        self.spike = surrogate.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.full_like(x, 0.3)
        self.v = self.v * self.gain + x.clamp(-1, 1)
        spike = self.spike(self.v - 1.0)
        self.v = self.v - spike * self.gain.sigmoid()
        return spike


class LearntStart(snnfx.MemoryModule):
    """A first state that depends on a parameter and on the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.rand(3))
        self.register_memory("v", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = self.start * x
        self.v = 0.5 * self.v + x.exp()
        return self.v


def test_per_channel_parameters_of_a_users_module() -> None:
    assert_same_as_steps(PerChannel().double(), x_of(5, 2, 3, 4, 2))


def test_state_in_a_plain_attribute() -> None:
    assert_same_as_steps(PlainAttribute().double(), x_of(5, 4, 3), example_inputs=x_of(4, 3))


def test_first_state_that_is_computed() -> None:
    assert_same_as_steps(LearntStart().double(), x_of(5, 4, 3), example_inputs=x_of(4, 3))


class Coupled(snnfx.MemoryModule):
    def __init__(self, couple: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self.couple = couple

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.couple(self.v + x)
        return self.v


@pytest.mark.parametrize(
    ("couple", "why"),
    [
        (lambda v: v - v.mean(1, keepdim=True), "`mean`"),
        (lambda v: v.flip(1), "`flip`"),
        (lambda v: v.cumsum(1), "`cumsum`"),
    ],
)
def test_what_is_not_elementwise_is_no_single_kernel(couple: Callable[[Tensor], Tensor], why: str) -> None:
    model = Coupled(couple)
    net, stepped = snnfx.convert(model), snnfx.convert(model, lower=None)
    x_seq = x_of(4, 2, 3)
    torch.testing.assert_close(net(x_seq), stepped(x_seq))
    assert not any(isinstance(k.in_use, LoweredStep) for k in kernels_of(net))
    (note,) = snnfx.explain(net).kernels
    assert note.startswith("Stepped with element-wise kernels") and why in note


def test_what_draws_random_numbers_is_stepped() -> None:
    model = Coupled(lambda v: v * torch.rand_like(v) * 0)
    net, stepped = snnfx.convert(model), snnfx.convert(model, lower=None)
    x_seq = x_of(4, 2, 3)
    torch.testing.assert_close(net(x_seq), stepped(x_seq))
    assert all(k.in_use is None for k in kernels_of(net))
    (note,) = snnfx.explain(net).kernels
    assert note.startswith("Stepped by PyTorch: loop_0, because") and "random" in note


class Wandering(snnfx.MemoryModule):
    """Its step reads the data in Python; capture treats it as a leaf, so only the recording detects that."""

    elementwise = True

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def state_names(self) -> tuple[str, ...]:
        return ("v",)

    def initial_state(self, x: Tensor) -> Any:
        return (torch.zeros_like(x),)

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v + x if float(x.sum()) > 0 else self.v - x
        return self.v

    def step(self, state: Any, x: Tensor) -> Any:
        (v,) = state
        v = v + x if float(x.sum()) > 0 else v - x
        return v, (v,)


def test_python_that_decides_by_the_data_is_stepped() -> None:
    net = snnfx.convert(nn.Sequential(Wandering()))
    x_seq = x_of(3, 2, 2) - 0.5
    v = torch.zeros(2, 2, dtype=torch.float64)
    for x in x_seq:
        v = v + x if float(x.sum()) > 0 else v - x
    torch.testing.assert_close(net(x_seq)[-1], v)
    assert "Python decides" in kernels_of(net)[0].refusal


# -- shapes, layouts, dtypes -----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    T=st.integers(1, 10),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    permute=st.randoms(use_true_random=False),
    step=st.sampled_from([1, 2]),
    threads=st.sampled_from([1, 2]),
)
def test_any_shape_and_strides(T: int, shape: list[int], permute: Any, step: int, threads: int) -> None:
    order = list(range(len(shape)))
    permute.shuffle(order)
    whole = torch.randn(T * step, *[shape[d] * step for d in order], dtype=torch.float64)
    inverse = [order.index(d) + 1 for d in range(len(shape))]
    x_seq = whole[tuple(slice(None, None, step) for _ in range(whole.dim()))].permute(0, *inverse)
    assert x_seq.shape == (T, *shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_as_steps(nn.Sequential(neuron.ParametricLIFNode()).double(), x_seq)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1023, 1024, 1025, 4099, 70001])
def test_odd_sizes_and_several_threads(size: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same_as_steps(nn.Sequential(neuron.ParametricLIFNode()).double(), x_of(3, size))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("T", range(1, 10))
@pytest.mark.parametrize("name", ["LIF", "adaptive"])
def test_number_of_steps_that_does_not_fill_a_stride(name: str, T: int) -> None:
    assert_same_as_steps(nn.Sequential(ZOO[name]()).double(), x_of(T, 5, 3))


def test_state_that_is_true_or_false_is_read_before_it_is_written() -> None:
    class Alternating(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("fired", None)
            self.register_memory("before", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.fired is None:
                self.fired, self.before = x > 2, x > 2
            self.fired, self.before = (x > 0.5) ^ self.before, self.fired
            return torch.where(self.before, x, -x)

    assert_same_as_steps(nn.Sequential(Alternating()), x_of(9, 5, 3))


@pytest.mark.parametrize("leak", [(3,), (1, 3), (2, 1), (2, 3), (1, 1), ()])
def test_operands_of_any_broadcastable_shape(leak: tuple[int, ...]) -> None:
    class Leaky(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.leak = nn.Parameter(torch.rand(leak))
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.v * self.leak + x
            return self.v

    assert_same_as_steps(Leaky().double(), x_of(4, 2, 3), example_inputs=x_of(2, 3))


def test_input_that_is_smaller_than_the_state() -> None:
    class TwoSizes(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.v * x[:, :1].sigmoid() + x
            return self.v

    assert_same_as_steps(TwoSizes().double(), x_of(4, 2, 3))


def test_channels_last_stays_channels_last() -> None:
    x_seq = x_of(3, 2, 4, 5, 6).permute(0, 1, 4, 2, 3).requires_grad_()
    net = snnfx.convert(nn.Sequential(neuron.LIFNode()))
    y_seq = net(x_seq)
    assert_used(net)
    assert y_seq.stride() == x_seq.stride()
    y_seq.backward(torch.ones_like(y_seq))
    assert x_seq.grad is not None and x_seq.grad.stride() == x_seq.stride()


def test_upstream_gradient_that_is_expanded() -> None:
    model = nn.Sequential(neuron.LIFNode())
    grads = []
    for net in (snnfx.convert(model), snnfx.convert(model, lower=None)):
        x_seq = torch.linspace(-1, 2, 24, dtype=torch.float64).view(4, 2, 3).requires_grad_()
        net(x_seq).sum().backward()
        grads.append(x_seq.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5, 3), (5, 0, 3), (3, 1, 1, 1)])
def test_one_step_one_sample_and_an_empty_batch(shape: tuple[int, ...]) -> None:
    assert_same_as_steps(nn.Sequential(neuron.AdaptiveLIFNode()).double(), x_of(*shape))


def test_batch_size_and_number_of_steps_build_nothing() -> None:
    net = snnfx.convert(nn.Sequential(neuron.LIFNode()))
    for T, N in ((4, 2), (5, 3), (9, 7)):
        net(x_of(T, N, 3))
    assert len(kernels_of(net)[0].entries) == 1


def test_nan_and_infinity_pass_through() -> None:
    x_seq = x_of(5, 4)
    x_seq[1, 0], x_seq[1, 1], x_seq[1, 2] = float("nan"), float("inf"), -float("inf")
    assert_same_as_steps(nn.Sequential(neuron.LIFNode(v_reset=None)), x_seq)
    assert_same_as_steps(PerChannel().double(), x_seq.view(5, 2, 1, 2, 1).expand(5, 2, 3, 2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(neuron.LIFNode())
    net, stepped = snnfx.convert(model), snnfx.convert(model, lower=None)
    x_seq = x_of(8, 50, 7, dtype=torch.float32).to(dtype)
    actual, expected = results(net, x_seq), results(stepped, x_seq.float())
    assert_used(net)
    assert all(value.dtype == dtype for value in actual[0])
    assert_close([actual[0][0].float()], [expected[0][0]], 0.0)
    # The gradients from above are rounded to 16 bits as well.
    tolerance = 0.02 if dtype == torch.bfloat16 else 0.003
    assert_close([actual[1][0].float()], [expected[1][0]], tolerance)


def test_every_bit_pattern_of_half_precision_survives() -> None:
    class Identity(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("n", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.n = self.n * 0.5 + x.clamp(-1, 1)
            return x * 1.0 + self.n * 0.0

    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype)
        net = snnfx.convert(Identity())
        y = net(x.unsqueeze(0).unsqueeze(0))[0, 0]
        assert_used(net)
        torch.testing.assert_close(y.float(), x.float() + 0.0, rtol=0, atol=0, equal_nan=True)


def test_float32_spikes_differ_only_where_the_potential_is_at_the_threshold() -> None:
    x_seq = torch.randn(16, 4096) + 0.5
    model = nn.Sequential(neuron.LIFNode(tau=2.3))
    net, stepped = snnfx.convert(model), snnfx.convert(model, lower=None)
    actual, expected = net(x_seq), stepped(x_seq)
    exact = snnfx.convert(model, lower=None).run(x_seq.double(), record=("0.v",))[2]["0.v"]
    different = actual != expected
    assert int(different.any(0).sum()) <= 4
    assert exact.shape == x_seq.shape


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "exp": (torch.exp, -80, 88),
    "sigmoid": (torch.sigmoid, -86, 90),
    "tanh": (torch.tanh, -12, 12),
    "expm1": (torch.expm1, -20, 20),
    "log": (torch.log, 1e-3, 1e4),
    "log1p": (torch.log1p, -0.99, 50),
    "atan": (torch.atan, -30, 30),
    "erf": (torch.erf, -4, 4),
    "sin": (torch.sin, -10, 10),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_right_to_a_few_units_in_the_last_place(name: str, dtype: torch.dtype) -> None:
    function, low, high = FUNCTIONS[name]

    class Iterated(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.v = function(self.v + x)
            return self.v

    net = snnfx.convert(Iterated())
    x = torch.linspace(low, high, 20011, dtype=torch.float64).to(dtype)
    exact = function(x.double())
    error = (net(x[None])[0].double() - exact).abs() / exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert_used(net)
    assert float(error.max()) <= 3 * torch.finfo(dtype).eps
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1000.0, -1000.0], dtype=dtype)
    torch.testing.assert_close(net(special[None])[0], function(special), equal_nan=True)


# -- life ------------------------------------------------------------------------------------------------------------


def test_a_changed_hyperparameter_acts_at_the_next_call() -> None:
    lif = neuron.LIFNode(tau=2.0)
    net = snnfx.convert(nn.Sequential(lif))
    x_seq = x_of(5, 4)
    first = net(x_seq)
    lif.tau, lif.v_threshold, lif.surrogate_function.alpha = 1.5, 0.3, 2.0  # type: ignore[union-attr]
    assert_same_as_steps(net.source, x_seq)
    stepped = snnfx.convert(net.source, lower=None)
    torch.testing.assert_close(net(x_seq), stepped(x_seq))
    assert not torch.equal(net(x_seq), first)


def test_a_hook_on_a_lowered_neuron_fires() -> None:
    lif = neuron.LIFNode()
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 3), lif))
    net(torch.rand(4, 2, 3))
    calls: list[int] = []
    handle = lif.register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(4, 2, 3))
    assert len(calls) == 4
    handle.remove()
    net(torch.rand(4, 2, 3))
    assert len(calls) == 4


def test_a_gradient_that_is_to_be_differentiated_is_refused() -> None:
    net = snnfx.convert(nn.Sequential(neuron.LIFNode()))
    x_seq = x_of(4, 3).requires_grad_()
    with pytest.raises(snnfx.errors.InputError, match="SNNFX316"):
        torch.autograd.grad(net(x_seq).sum(), x_seq, create_graph=True)


def test_transforms_of_torch_func_get_the_loop() -> None:
    net = snnfx.convert(nn.Sequential(neuron.LIFNode()))
    x_seq = x_of(4, 3)
    expected = results(snnfx.convert(net.source, lower=None), x_seq)
    _, pullback = torch.func.vjp(net, x_seq)
    (gradient,) = pullback(torch.ones(4, 3, dtype=torch.float64))
    assert gradient.shape == expected[1][0].shape
    per_sample = torch.vmap(net, in_dims=1, out_dims=1)(x_of(4, 3, 2))
    assert per_sample.shape == (4, 3, 2)


def test_copies_and_pickles_run_kernels() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 3), neuron.LIFNode()))
    x_seq = torch.rand(4, 2, 3)
    expected = net(x_seq)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x_seq), expected)
        assert_used(other)


def test_streaming_in_pieces_equals_the_whole() -> None:
    net = snnfx.convert(nn.Sequential(neuron.AdaptiveLIFNode()).double())
    x_seq = x_of(9, 4)
    whole, final = net.run(x_seq)
    state, parts = None, []
    for piece in x_seq.split(2):
        y, state = net.run(piece, state=state)
        parts.append(y)
    assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(state[name], final[name]) for name in final)  # type: ignore[index]


def test_recorded_potentials_come_from_the_kernel() -> None:
    model = nn.Sequential(neuron.LIFNode())
    net, stepped = snnfx.convert(model), snnfx.convert(model, lower=None)
    x_seq = x_of(5, 4)
    for a, b in zip(net.run(x_seq, record=("0.v",)), stepped.run(x_seq, record=("0.v",)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_training_keeps_one_tensor_of_a_lif_layer() -> None:
    net = snnfx.convert(nn.Sequential(neuron.LIFNode()))
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        net(x_of(4, 8).requires_grad_())
    assert [t.shape for t in packed] == [(4, 8)]


def test_no_compiler_means_the_loop_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_loaded", {})  # kernels of other tests
    monkeypatch.setenv("SNNFX_KERNELS", "0")

    class Unheard(neuron.LIFNode):
        def charge(self, v: Tensor, x: Tensor) -> Tensor:
            return v * 0.317 + x * x * x

    net = snnfx.convert(nn.Sequential(Unheard(), Unheard()))
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX505") as caught:
        net(x_of(3, 2))
    assert len(caught) == 1
    assert all(k.in_use is None for k in kernels_of(net))
    assert "no C++ compiler" in snnfx.explain(net).kernels[0]


def _build_in_a_folder(folder: str) -> bool:
    import os

    os.environ["SNNFX_CACHE_DIR"] = folder
    net = snnfx.convert(nn.Sequential(neuron.LIFNode(tau=2.7)))
    expected = snnfx.convert(net.source, lower=None)(torch.ones(3, 5))
    return bool(torch.equal(net(torch.ones(3, 5)), expected)) and kernels_of(net)[0].in_use is not None


def test_processes_that_build_at_once_get_along(tmp_path: Any) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.map(_build_in_a_folder, [str(tmp_path)] * 3))
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob(".build_*"))


def test_explain_tells_of_kernels() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 3), neuron.LIFNode()))
    assert snnfx.explain(net).kernels == (
        "Expected to be one kernel for all time steps: loop_1, compiled at the first call.",
    )
    net(torch.rand(4, 2, 3)).sum().backward()
    assert "training saves 1 tensor" in snnfx.explain(net).kernels[0]
    assert any(record.description.startswith("lower") for record in net.history)


def test_operator_passes_opcheck() -> None:
    net = snnfx.convert(nn.Sequential(neuron.ParametricLIFNode()).double())
    (loop,) = loops_of(net)
    lif = net.source[0]  # type: ignore[index]
    x_seq = x_of(4, 2, 3).requires_grad_()
    arguments = (loop.handle, [x_seq], [lif.w], [], False, [True, True])
    torch.library.opcheck(torch.ops.snnfx.run_region, arguments)
    assert_used_by_operator(loop, arguments)


def assert_used_by_operator(loop: LoopRegion, arguments: Any) -> None:
    saved = torch.ops.snnfx.run_region(*arguments)
    # The output, the final state and one saved tensor; the loop keeps the states after each step instead.
    assert loop.kernels is not None and len(saved) == 3 and loop.kernels.entries


# -- memory --------------------------------------------------------------------------------------------------------


def test_memory_of_a_dead_tensor_is_used_again() -> None:
    pool = BufferPool()
    first = pool.empty((1 << 20,), (1,), torch.float32)
    address = first.data_ptr()
    view = first[5:].view(-1, 1)
    del first
    second = pool.empty((1 << 20,), (1,), torch.float32)
    assert second.data_ptr() != address  # the view is alive
    del view
    gc.collect()
    assert pool.empty((1 << 20,), (1,), torch.float32).data_ptr() == address


def test_pool_is_bounded_and_can_be_emptied() -> None:
    pool = BufferPool(limit=6 << 20)
    tensors = [pool.empty((1 << 20,), (1,), torch.float32) for _ in range(3)]
    del tensors
    pool.empty((1 << 18,), (1,), torch.float32)
    assert pool.free_bytes <= 6 << 20
    assert pool.release() == 5 << 20
    assert snnfx.release_buffers() >= 0


def test_autograd_keeps_what_the_pool_gave() -> None:
    pool = BufferPool()
    leaf = torch.ones(1 << 19, requires_grad=True)
    factor = pool.empty((1 << 19,), (1,), torch.float32).fill_(3.0)
    product = leaf * factor
    del factor
    other = pool.empty((1 << 19,), (1,), torch.float32).fill_(7.0)
    product.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.full_like(leaf, 3.0)) and float(other[0]) == 7.0


# -- inputs of fewer dimensions, numbers of other kinds -------------------------------------------------------------


class BatchInhibition(snnfx.MemoryModule):
    """Neurons that are inhibited by the mean input of their feature over the batch: `[N, 3]` and `[3]` in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_memory("v", 0.0)
        self.spike = surrogate.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        current = self.fc(x)
        v = self.v * current.mean(0) + current
        spike = self.spike(v - 0.4)
        self.v = v * (1 - spike)
        return spike


@pytest.mark.parametrize(("T", "N"), [(4, 2), (4, 4), (3, 3), (3, 1)])
def test_gradient_of_an_input_that_has_no_batch(T: int, N: int) -> None:
    torch.manual_seed(0)
    model = BatchInhibition().double()
    x_seq = 3 * torch.rand(T, N, 3, dtype=torch.float64)
    above = torch.rand(T, N, 3, dtype=torch.float64)
    reference = copy.deepcopy(model)
    (torch.stack([reference(x) for x in x_seq]) * above).sum().backward()
    net = snnfx.convert(model, example_inputs=x_seq[0])
    (net(x_seq) * above).sum().backward()
    assert_used(net)
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-12, atol=1e-12)


def test_complex_states_keep_their_gradients() -> None:
    class Resonator(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.frequency = nn.Parameter(torch.rand(3, dtype=torch.float64))
            self.register_memory("z", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.z is None:
                self.z = torch.zeros(x.shape, dtype=torch.complex128)
            self.z = self.z * torch.exp(torch.complex(-0.1 * torch.ones_like(self.frequency), self.frequency)) + x
            return self.z.real.sigmoid()

    model = nn.Sequential(Resonator())
    x_seq = x_of(5, 2, 3)
    reference = copy.deepcopy(model)
    torch.stack([reference(x) for x in x_seq]).square().sum().backward()
    net = snnfx.convert(model, example_inputs=x_seq[0])
    net(x_seq).square().sum().backward()
    torch.testing.assert_close(model[0].frequency.grad, reference[0].frequency.grad, rtol=1e-12, atol=1e-12)
    assert "complex" in kernels_of(net)[0].refusal


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_state_of_two_values_in_one_tensor(dim: int) -> None:
    """A part of a state is not the state: the gradient of `select` has zeros elsewhere."""

    class TwoInOne(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("both", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.both is None:
                self.both = torch.stack([torch.zeros_like(x)] * 2, dim)
            v, w = self.both.select(dim, 0), self.both.select(dim, 1)
            v = 0.5 * v + x
            w = 0.7 * w + torch.sigmoid(v)
            self.both = torch.stack([v, w], dim)
            return torch.sigmoid(w)

    model = nn.Sequential(nn.Linear(3, 3), TwoInOne()).double()
    x_seq = x_of(4, 2, 3)
    reference = copy.deepcopy(model)
    torch.stack([reference(x) for x in x_seq]).square().sum().backward()
    snnfx.convert(model, example_inputs=x_seq[0])(x_seq).square().sum().backward()
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-12, atol=1e-12)
