"""Kernels for GPUs: the generated Triton against the user's model stepped in a plain loop.

Where there is no GPU the cases run in Triton's interpreter, on the CPU. It has to be asked for before Triton is
imported, so `test_cases_in_the_interpreter` runs this file once more, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron, surrogate
from snnfx.lowering.elementwise.triton import triton_launch
from snnfx.lowering.elementwise.triton.triton_launch import TritonBackEnd
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.region_modules import LoopRegion
from support.spikes import Spike
from support.stepping import assert_same_run, fresh_copy, run_net, run_stepped

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("SNNFX_KERNELS") == "triton"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent
ROOT = Path(__file__).parents[3]
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU; without one, test_cases_in_the_interpreter runs it",
)
on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
in_this_process = pytest.mark.skipif(INTERPRETED, reason="for the process that starts the interpreter")


def runs_kernels(test: Callable[..., None]) -> Any:
    """Mark a test that runs kernels, on a GPU or in the interpreter; `tools/gpu.sh` selects it by its mark."""
    return pytest.mark.triton(needs_kernels(test))


def kernels_of(net: Any) -> list[RegionKernels]:
    return [m.kernels for m in net.snnfx_regions.modules() if isinstance(m, LoopRegion) and m.kernels is not None]


def assert_used(net: Any) -> None:
    """A loop of the net ran, and all that ran were Triton kernels."""
    used = [kernels.in_use for kernels in kernels_of(net) if kernels.in_use is not None]
    assert used and all(isinstance(lowered.back_end, TritonBackEnd) for lowered in used)
    assert not any(kernels.refusal for kernels in kernels_of(net)), [k.refusal for k in kernels_of(net)]


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) + 0.5).to(device=DEVICE, dtype=dtype)


def assert_same_as_steps(model: nn.Module, *sequences: Tensor, tolerance: float = 1e-12, **options: Any) -> Any:
    net = snnfx.convert(model, **options)
    assert_steps_equal(net, model, *sequences, tolerance=tolerance)
    return net


def assert_steps_equal(net: Any, model: nn.Module, *sequences: Tensor, tolerance: float) -> None:
    actual, expected = run_net(net, *sequences), run_stepped(model, *sequences)
    # Some libraries have their state among the buffers.
    actual.buffers, expected.buffers = {}, {}
    assert_same_run(actual, expected, tolerance)
    assert_used(net)


# -- in other processes ----------------------------------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python beside this process, which may have imported Triton in another mode."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SNNFX_KERNELS")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), inherited.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    given = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SNNFX_KERNELS": "triton", **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, cwd=ROOT)


@in_this_process
def test_cases_in_the_interpreter() -> None:
    pytest.importorskip("numpy", reason="Triton's interpreter computes with NumPy")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)))
    done = python(*arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@in_this_process
@pytest.mark.slow
def test_cases_of_the_cpu_pass_in_the_interpreter() -> None:
    pytest.importorskip("numpy", reason="Triton's interpreter computes with NumPy")
    # A surrogate with `pow`, which the interpreter has not, and a test about the files of the C++ compiler.
    others = "not QPseudoSpike and not processes_that_build_at_once"
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_kernels.py"), "-k", others)
    done = python(*arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What kernels become when they are compiled for an H100, by `triton_for_cuda.py`."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    folder = str(tmp_path_factory.mktemp("triton"))
    done = python(
        str(ROOT / "tests" / "support" / "triton_for_cuda.py"), SNNFX_CACHE_DIR=folder, TRITON_CACHE_DIR=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@in_this_process
@pytest.mark.parametrize("name", ["LIF", "LIF in float16", "PLIF in float64", "adaptive", "per channel", "curves"])
def test_kernels_compile_for_a_gpu_once_for_all_T(name: str, compiled: dict[str, Any]) -> None:
    found = compiled[name]
    assert found["directions"] == ["backward", "forward"]
    assert found["machine code"]
    # T = 1, 5 and 33, an odd number of elements.
    assert found["compilations of each kernel"] == [1]


@in_this_process
@pytest.mark.parametrize("name", ["LIF", "PLIF in float64", "adaptive", "per channel", "curves"])
def test_nothing_is_contracted_or_approximated(name: str, compiled: dict[str, Any]) -> None:
    instructions = set(compiled[name]["arithmetic"])
    assert {"add", "mul"} <= {i.split(".")[0] for i in instructions}
    # The default rounding, ".rn", forbids that the assembler makes one instruction of two.
    assert all(".rn." in i for i in instructions), instructions
    forbidden = ("fma", "mad", "approx", "ftz", "full")
    assert not any(word in i for i in instructions for word in forbidden), instructions


@in_this_process
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_rounded_to_the_nearest(dtype: str, compiled: dict[str, Any]) -> None:
    name = "LIF in float16" if dtype == "f16" else "LIF in bfloat16"
    conversions = {c for c in compiled[name]["conversions"] if f".{dtype}" in c.rpartition(".")[0]}
    assert conversions and all(c.startswith("cvt.rn.") for c in conversions), conversions


@in_this_process
def test_every_operation_compiles_for_a_gpu(compiled: dict[str, Any]) -> None:
    assert compiled["operations"]["failed"] == {}
    assert compiled["operations"]["count"] > 70


@in_this_process
def test_a_step_of_more_than_31_bits_compiles_for_a_gpu(compiled: dict[str, Any]) -> None:
    assert compiled["wide"] == {"elements": "i64", "machine code": True}


@in_this_process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_the_interpreter_the_loop_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_KERNELS", "triton")
    assert_falls_back("needs its interpreter")


@in_this_process
def test_without_triton_the_loop_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_KERNELS", "triton")
    monkeypatch.setattr(triton_launch, "_loaded", {})
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    assert_falls_back("Triton is not installed")


def assert_falls_back(reason: str) -> None:
    net = snnfx.convert(nn.Sequential(neuron.LIFNode(), neuron.LIFNode()))
    x_seq = torch.rand(3, 2)
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX505") as caught:
        y_seq = net(x_seq)
    assert len(caught) == 1 and reason in str(caught[0].message)
    assert torch.equal(y_seq, snnfx.convert(net.source, lower=None)(x_seq))
    assert reason in snnfx.explain(net).kernels[0]


# -- neurons ---------------------------------------------------------------------------------------------------------

NEURONS: dict[str, Callable[[], nn.Module]] = {
    "IF": neuron.IFNode,
    "LIF": neuron.LIFNode,
    "LIF, soft reset": lambda: neuron.LIFNode(tau=3.0, v_reset=None, decay_input=False),
    "LIF, detached reset": lambda: neuron.LIFNode(v_reset=-0.2, detach_reset=True),
    "PLIF": neuron.ParametricLIFNode,
    "adaptive": neuron.AdaptiveLIFNode,
    "CUBA": neuron.CUBALIFNode,
    "SpikingJelly LIFNode": lambda: of_spikingjelly("LIFNode"),
    "SpikingJelly ParametricLIFNode": lambda: of_spikingjelly("ParametricLIFNode"),
    "SpikingJelly EIFNode": lambda: of_spikingjelly("EIFNode"),
    "snnTorch Leaky": lambda: of_snntorch("Leaky", beta=torch.tensor(0.8), learn_beta=True),
    "snnTorch Synaptic": lambda: of_snntorch("Synaptic", alpha=0.7, beta=0.8, reset_mechanism="zero"),
}


def of_spikingjelly(name: str) -> nn.Module:
    return getattr(pytest.importorskip("spikingjelly.activation_based.neuron"), name)()  # type: ignore[no-any-return]


def of_snntorch(name: str, **options: Any) -> nn.Module:
    return getattr(pytest.importorskip("snntorch"), name)(init_hidden=True, **options)  # type: ignore[no-any-return]


@runs_kernels
@pytest.mark.parametrize("name", NEURONS)
def test_neuron_equals_stepping_for_any_T_with_the_same_kernels(name: str) -> None:
    model = nn.Sequential(NEURONS[name]()).double().to(DEVICE)
    net = assert_same_as_steps(model, x_of(1, 3, 7), tolerance=tolerance_of(name))
    texts = set(triton_launch._loaded)
    for T in (5, 33):
        assert_steps_equal(net, model, x_of(T, 3, 7), tolerance=tolerance_of(name))
    assert set(triton_launch._loaded) == texts


def tolerance_of(name: str) -> float:
    # Its spikes are float32 whatever the input is, and so are the sums of gradients that go through them.
    return 1e-6 if name == "snnTorch Leaky" else 1e-12


@runs_kernels
def test_cell_of_norse() -> None:
    norse = pytest.importorskip("norse.torch")

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = norse.LIFCell()

        def forward(self, x: Tensor, state: Any = None) -> Any:
            return self.cell(x, state)

    cell, x_seq = Cell().to(DEVICE), 2 * x_of(6, 4, 3)
    net = snnfx.convert(cell, carry={"state": 1})
    state, spikes = None, []
    for x in x_seq:
        spike, state = cell(x, state)
        spikes.append(spike)
    y_seq, _ = net(x_seq)
    assert_used(net)
    assert torch.equal(y_seq, torch.stack(spikes))


class TwoStates(snnfx.MemoryModule):
    """A current and a potential, a threshold and a leak for each channel, a reset by selection."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.linspace(0.5, 1.0, channels).view(channels, 1))
        self.leak = nn.Parameter(torch.tensor(0.3))
        self.register_memory("v", 0.0)
        self.register_memory("i", 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.i = self.i * self.leak.sigmoid() + x - 0.2 * self.v
        self.v = 0.8 * self.v + torch.tanh(self.i) * self.threshold.exp()
        spike = Spike.apply(self.v - self.threshold)
        self.v = torch.where(spike > 0.5, 0.1 * self.v, self.v)
        return spike + 0.1 * self.v


def run_two_states(run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]], model: TwoStates, T: int) -> list[Any]:
    """Outputs, final states, and gradients of inputs, initial states and parameters."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(T, 5, 3, 2), (5, 3, 2), (5, 3, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_() for s in shapes]
    results = run(*inputs)
    loss = sum((r * r.cos()).sum() * (k + 1) for k, r in enumerate(results))
    return [*results, *torch.autograd.grad(loss, [*inputs, *model.parameters()])]


@runs_kernels
@pytest.mark.parametrize("T", [1, 6])
def test_given_initial_states_and_gradients_of_final_states(T: int) -> None:
    model = TwoStates().double().to(DEVICE)
    net, stepped = snnfx.convert(model), fresh_copy(model)

    def run(x_seq: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        y_seq, final = net.run(x_seq, state={"v": v, "i": i})
        return y_seq, final["v"], final["i"]

    def step(x_seq: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        stepped.v, stepped.i = v, i
        return torch.stack([stepped(x) for x in x_seq]), stepped.v, stepped.i

    actual, expected = run_two_states(run, model, T), run_two_states(step, stepped, T)
    assert_used(net)
    # The backward pass computes a state from what was saved one step earlier, which the first step has not.
    (lowered,) = [kernels.in_use for kernels in kernels_of(net) if kernels.in_use is not None]
    assert any(training.plan.earlier for training in lowered._training.values())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@runs_kernels
def test_another_hyperparameter_makes_no_kernel() -> None:
    lif = neuron.LIFNode(tau=2.3, v_threshold=0.9)
    net = assert_same_as_steps(nn.Sequential(lif).double(), x_of(4, 5))
    texts = set(triton_launch._loaded)
    lif.tau, lif.v_threshold = 3.7, 0.6
    assert_same_as_steps(net.source, x_of(4, 5))
    assert set(triton_launch._loaded) == texts


# -- shapes, layouts, dtypes -----------------------------------------------------------------------------------------


@runs_kernels
def test_inputs_with_gaps_and_in_another_order() -> None:
    model = nn.Sequential(neuron.AdaptiveLIFNode()).double()
    for x_seq in (
        x_of(5, 4, 6, 3)[:, :, ::2],
        x_of(3, 6, 4, 5).permute(3, 0, 2, 1),
        x_of(5, 4, 1, 3).expand(5, 4, 6, 3),
        x_of(1, 4, 3).expand(5, 4, 3),
        x_of(5, 700),
    ):
        net = snnfx.convert(model)
        leaf, copied = x_seq.detach().requires_grad_(), x_seq.detach().contiguous().requires_grad_()
        above = torch.randn(x_seq.shape, dtype=torch.float64).to(DEVICE).transpose(1, -1).contiguous().transpose(1, -1)
        y_seq = net(leaf)
        stepped = fresh_copy(model)
        expected = torch.stack([stepped(x) for x in copied])
        assert_used(net)
        assert torch.equal(y_seq, expected)
        (gradient,) = torch.autograd.grad(y_seq, leaf, above)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, copied, above)[0], rtol=1e-12, atol=1e-12)


class Gated(snnfx.MemoryModule):
    """A second input that is smaller than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        self.v = self.v * gate + x
        return torch.exp(-self.v * self.v) / (1.0 + torch.sqrt(self.v.abs() + 0.1))


@runs_kernels
def test_an_input_that_is_broadcast() -> None:
    assert_same_as_steps(Gated(), x_of(5, 4, 3), x_of(5, 4, 1))


@runs_kernels
def test_empty_batch() -> None:
    model = nn.Sequential(neuron.ParametricLIFNode()).double().to(DEVICE)
    net = snnfx.convert(model)
    y_seq, state = net.run(x_of(4, 0, 3))
    assert y_seq.shape == (4, 0, 3) and state["0.v"].shape == (0, 3)
    y_seq.sum().backward()
    assert float(model[0].w.grad) == 0.0  # type: ignore[arg-type, union-attr]
    assert_used(net)


@runs_kernels
def test_more_elements_than_one_program_takes() -> None:
    model = nn.Sequential(neuron.ParametricLIFNode()).double().to(DEVICE)
    assert_same_as_steps(model, x_of(2, 3, 257), tolerance=1e-11)


class Rooted(snnfx.MemoryModule):
    """Its derivative is infinite at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.v = torch.sqrt(self.w * self.v * self.v + x)
        return self.v


@runs_kernels
def test_what_lies_beyond_the_last_element_is_in_no_sum() -> None:
    assert_same_as_steps(Rooted().double().to(DEVICE), x_of(4, 5, 3).abs() + 0.1)


@runs_kernels
def test_spikes_of_float32_are_those_of_the_steps() -> None:
    model = nn.Sequential(neuron.LIFNode(tau=3.0))
    x_seq = 2 * x_of(9, 5, 31, dtype=torch.float32)
    net, stepped = snnfx.convert(model), fresh_copy(model)
    y_seq, state = net.run(x_seq)
    assert_used(net)
    assert torch.equal(y_seq, torch.stack([stepped(x) for x in x_seq]))
    assert torch.equal(state["0.v"], stepped[0].v)  # type: ignore[index]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_memory_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = nn.Sequential(neuron.LIFNode(tau=3.0))
    net, stepped = snnfx.convert(model), fresh_copy(model)
    x_seq = x_of(6, 4, 9, dtype=dtype).requires_grad_()
    wide = x_seq.detach().float().requires_grad_()
    y_seq, state = net.run(x_seq)
    expected = torch.stack([stepped(x) for x in wide])
    assert_used(net)
    assert y_seq.dtype == dtype and torch.equal(y_seq.float(), expected)
    # The interpreter does not round to bfloat16, it truncates; the compiled kernels round.
    truncates = INTERPRETED and dtype == torch.bfloat16
    final, tolerance = stepped[0].v.to(dtype), torch.finfo(dtype).eps if truncates else 0.0  # type: ignore[index, operator, union-attr]
    torch.testing.assert_close(state["0.v"], final, rtol=tolerance, atol=0.0)
    (actual,), (exact,) = torch.autograd.grad(y_seq.sum(), x_seq), torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(actual, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@runs_kernels
def test_nan_and_infinity_pass_through() -> None:
    x_seq = x_of(5, 3, 4)
    x_seq[1, 0, 0], x_seq[2, 1, 1], x_seq[3, 2, 2] = float("nan"), float("inf"), -float("inf")
    for name in ("LIF", "LIF, soft reset", "adaptive"):
        model = nn.Sequential(NEURONS[name]()).double()
        net = snnfx.convert(model)
        actual, expected = run_net(net, x_seq), run_stepped(model, x_seq)
        assert_used(net)
        torch.testing.assert_close(actual.outputs, expected.outputs, equal_nan=True)
        torch.testing.assert_close(actual.input_grads[0], expected.input_grads[0], equal_nan=True)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "exp": (torch.exp, -80, 88),
    "sigmoid": (torch.sigmoid, -86, 90),
    "tanh": (torch.tanh, -12, 12),
    "expm1": (torch.expm1, -20, 20),
    "log": (torch.log, 1e-3, 1e4),
    "log1p": (torch.log1p, -0.99, 50),
    "atan": (torch.atan, -30, 30),
    "erf": (torch.erf, -4, 4),
    "sqrt": (torch.sqrt, 0, 50),
    "sin": (torch.sin, -10, 10),
    "round": (torch.round, -9, 9),
    "trunc": (torch.trunc, -9, 9),
    "floor": (torch.floor, -9, 9),
    "sign": (torch.sign, -2, 2),
    "abs": (torch.abs, -2, 2),
    "reciprocal": (torch.reciprocal, 0.1, 9),
    "selection": (lambda x: torch.where(torch.logical_and(x.lt(0.5), torch.logical_not(x.gt(-0.5))), -x, x), -2, 2),
    "clamp": (lambda x: x.clamp(-1, 1), -2, 2),
}


class Iterated(snnfx.MemoryModule):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.function(self.v + x)
        return self.v


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_right_to_a_few_units_in_the_last_place(name: str, dtype: torch.dtype) -> None:
    function, low, high = FUNCTIONS[name]
    net = snnfx.convert(Iterated(function))
    x = torch.linspace(low, high, 1001, dtype=torch.float64).to(device=DEVICE, dtype=dtype)
    exact = function(x.double())
    error = (net(x[None])[0].double() - exact).abs() / exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert_used(net)
    assert float(error.max()) <= 3 * torch.finfo(dtype).eps
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1000.0, -1000.0, 0.5, 2.5, -2.5]
    given = torch.tensor(special, dtype=dtype, device=DEVICE)
    if name != "sin":  # far from zero the sine loses digits to the reduction of its argument
        torch.testing.assert_close(net(given[None])[0], function(given), equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter")
def test_what_the_interpreter_lacks_is_stepped_with_a_reason() -> None:
    net = snnfx.convert(Iterated(torch.erfc))
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX505"):
        y_seq = net(x_of(1, 5))
    assert y_seq.shape == (1, 5)
    assert "no `erfc`" in snnfx.explain(net).kernels[0]


# -- on a GPU --------------------------------------------------------------------------------------------------------


@runs_kernels
@pytest.mark.parametrize("T", [1, 5])
def test_operator_of_compiled_nets_runs_the_kernels(T: int) -> None:
    model = nn.Sequential(neuron.ParametricLIFNode()).double().to(DEVICE)
    net = snnfx.convert(model)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x_seq = x_of(T, 3, 7)
    assert_same_run(run_net(compiled, x_seq), prefixed(run_stepped(model, x_seq)), 1e-12)
    assert any(k.entries and all(e.lowered is not None for e in k.entries.values()) for k in kernels_of(net))


def prefixed(run: Any) -> Any:
    """The names of a compiled module have a prefix."""
    run.parameter_grads = {f"_orig_mod.{name}": grad for name, grad in run.parameter_grads.items()}
    return run


@on_a_gpu
@pytest.mark.gpu
def test_compiled_net_on_a_gpu_trains_as_the_steps() -> None:
    model = nn.Sequential(nn.Linear(6, 8), neuron.LIFNode(), nn.Linear(8, 4), TwoStates(1)).double().to(DEVICE)
    net = snnfx.convert(model)
    compiled = torch.compile(net, fullgraph=True)
    for T in (4, 7, 12):
        x_seq = x_of(T, 5, 6)
        assert_same_run(run_net(compiled, x_seq), prefixed(run_stepped(model, x_seq)), 1e-9)


@on_a_gpu
@pytest.mark.gpu
def test_one_compilation_for_all_T_on_a_gpu() -> None:
    net = snnfx.convert(nn.Sequential(neuron.LIFNode(surrogate_function=surrogate.ATan())))
    triton_launch._loaded.clear()
    for T in (1, 5, 33, 64):
        net(torch.rand(T, 3, 7, device=DEVICE, requires_grad=True)).square().sum().backward()
    assert_used(net)
    assert all(len(cache) == 1 for k in triton_launch._loaded.values() for cache, *_ in k.device_caches.values())


@on_a_gpu
@pytest.mark.gpu
def test_random_numbers_and_autocast_of_a_gpu() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(6, 8), neuron.LIFNode()).to(DEVICE))
    state = torch.cuda.get_rng_state()
    with torch.autocast("cuda", dtype=torch.float16):
        y_seq = net(torch.rand(4, 5, 6, device=DEVICE))
    assert_used(net)
    assert y_seq.shape == (4, 5, 8) and torch.equal(torch.cuda.get_rng_state(), state)


@on_a_gpu
@pytest.mark.gpu
def test_a_parameter_without_dimensions_may_be_on_the_cpu() -> None:
    class Scaled(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.tensor(0.7, dtype=torch.float64)
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.v = torch.tanh(self.v * self.scale + x)
            return self.v

    assert_same_as_steps(Scaled(), x_of(5, 4))
