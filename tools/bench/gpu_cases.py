"""What `tools/bench/gpu.py` runs on a card: tests of the kernels, layers of LIF neurons, and whole networks.

A layer is timed twice: "call" is one call from Python, with the launches; "device" is the same call replayed from a
CUDA graph, which is the time of the kernels alone. Its bounds are device copies: one for a forward pass, and three for
forward and backward, which read the input and write the output and the saved tensor, then read the saved tensor and
the gradient of the output and write that of the input.

In Triton's interpreter the same functions run tiny sizes on the CPU. Its times mean nothing; CUDA graphs are left out,
and torch.compile traces without generating code.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import memory_models
import networks
import torch
from layers import inference_call, peer_of, training_call
from networks import NetworkCase
from timing import alternate
from torch import Tensor

import snnfx
from snnfx.lowering.elementwise.triton.triton_launch import TritonBackEnd

__all__ = [
    "LayerOnCard",
    "Target",
    "card_layers",
    "card_networks",
    "measure_layer",
    "measure_network",
    "run_kernel_tests",
]

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/lowering/elementwise/test_triton.py"
FEW_TESTS = "float32_are_those_of_the_steps or half_precision_in_memory"
"""The tests in the interpreter, of which the test suite runs all."""

GRAPH_CALLS = 10
"""Calls in one CUDA graph of a layer, so that starting the graph takes a small part of the time."""
SMALL_BATCH = 1
"""The largest N for which a network is replayed from a CUDA graph: there, launches take most of the time."""

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Target:
    """Where to run: a card, or the CPU with Triton's interpreter.

    Args:
        interpreted: whether Triton interprets the kernels.
        seconds: minimum time of a comparison.
    """

    interpreted: bool
    seconds: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.interpreted else "cuda")

    def times(self, sides: Calls) -> dict[str, float]:
        if self.interpreted:
            return alternate(sides, self.seconds, least=1, warm_up=0)
        return alternate(sides, self.seconds, wait=torch.cuda.synchronize)

    def compiled(self, net: Any) -> Any:
        return torch.compile(net, fullgraph=True, backend="aot_eager" if self.interpreted else "inductor")


@dataclass(frozen=True)
class LayerOnCard:
    """A layer of C neurons for N samples."""

    T: int
    N: int
    C: int
    dtype: str


def has_spikingjelly() -> bool:
    return importlib.util.find_spec("spikingjelly") is not None


def card_layers(interpreted: bool) -> tuple[LayerOnCard, ...]:
    if interpreted:
        return tuple(LayerOnCard(3, 2, 70, dtype) for dtype in ("float16", "float32"))
    return tuple(LayerOnCard(T, 64, 65536, dtype) for dtype in ("float16", "float32") for T in (4, 8, 16, 32))


def card_networks(interpreted: bool) -> tuple[tuple[NetworkCase, networks.Network], ...]:
    # SpikingJelly defines the SEW-ResNet.
    names = ("SEW-ResNet-18", "Spikformer-like") if has_spikingjelly() else ("Spikformer-like",)
    if not interpreted:
        cases = [NetworkCase(name, 4, N) for N in (32, SMALL_BATCH) for name in names]
        return tuple((case, networks.NETWORKS[case.network]) for case in cases)
    tiny = functools.partial(memory_models.Spikformer, 16, blocks=1)
    return ((NetworkCase("Spikformer-like", 2, 1), (tiny, (3, 4, 4), False)),)


def run_kernel_tests(interpreted: bool, seconds: float) -> dict[str, Any]:
    """Run the tests of the Triton kernels in another process: counts, and the names of those that failed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SNNFX_KERNELS", "PYTEST_ADDOPTS")}
    if interpreted:
        kept |= {"TRITON_INTERPRET": "1", "SNNFX_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), kept.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", TESTS]
        command += ["-m", "triton", "-k", FEW_TESTS] if interpreted else ["-m", "triton or gpu"]
        if not interpreted and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(4, os.cpu_count() or 1))]
        try:
            done = subprocess.run(
                command, env=kept, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"passed": 0, "skipped": 0, "failed": [f"the tests took longer than {seconds:.0f} s"]}
        if not report.exists():
            ending = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            return {"passed": 0, "skipped": 0, "failed": [f"pytest wrote no report: {ending}"]}
        return counts(ElementTree.parse(report).getroot())


def counts(report: ElementTree.Element) -> dict[str, Any]:
    """Counts in a JUnit report of pytest; a run without a passed test has failed."""
    passed, skipped, failed = 0, 0, []
    for case in report.iter("testcase"):
        fault = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if fault is not None:
            failed.append(f"{case.get('name')}: {_first_line(fault.get('message') or '')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed if passed or failed else ["no test ran"]}


def measure_layer(case: LayerOnCard, target: Target) -> dict[str, Any]:
    """Median milliseconds of a LIF layer by implementation, forward and forward with backward."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shape = (case.T, case.N, case.C)
    x_seq = (1.2 * torch.rand(shape, device=target.device)).to(dtype)
    above = torch.rand(shape, device=target.device).to(dtype)
    net = snnfx.convert(memory_models.lif(), example_inputs=x_seq[0])
    runs: dict[str, Callable[[Tensor], Tensor]] = {"snnfx": net, **peers(target)}
    failed: dict[str, str] = {}
    result: dict[str, Any] = {"case": asdict(case), "failed": failed}
    outputs = [torch.empty_like(x_seq) for _ in range(3)]

    def copies(number: int) -> Callable[[], None]:
        def call() -> None:
            for output in outputs[:number]:
                output.copy_(x_seq)

        return call

    for kind, number in (("forward", 1), ("training", 3)):
        sides: Calls = {
            name: inference_call(run, x_seq) if kind == "forward" else training_call(run, x_seq, above)
            for name, run in runs.items()
        }
        sides = working({**sides, "copies": copies(number)}, failed, kind)
        result[kind] = {"call": target.times(sides)}
        if not target.interpreted:
            graphs = captured(sides, failed, kind, GRAPH_CALLS)
            result[kind]["device"] = {name: t / GRAPH_CALLS for name, t in target.times(graphs).items()}
    failed.update(not_kernels(net))
    with torch.no_grad():
        spikes = net(x_seq)
        result["other spikes"] = {
            name: float((runs[name](x_seq) != spikes).float().mean())
            for name in result["forward"]["call"]
            if name in runs and name != "snnfx"
        }
    return result


def peers(target: Target) -> dict[str, Callable[[Tensor], Tensor]]:
    """SpikingJelly's LIF neuron on the device, by the kernels that it uses; nothing if it is not installed."""
    if not has_spikingjelly():
        return {}
    from spikingjelly.activation_based import functional, neuron

    if "backend" not in inspect.signature(neuron.LIFNode.__init__).parameters:
        # From release 2 it chooses the kernels itself; SJ_LIF_CUDA_IMPLEMENTATION=triton asks for one kind.
        used = (
            "torch" if target.interpreted else functional.neuron_implementation("lif", target.device)["implementation"]
        )
        return {f"SpikingJelly ({used})": peer_of("LIF")[1]}
    wanted = ("torch",) if target.interpreted else ("triton", "cupy")
    offered = neuron.LIFNode(step_mode="m").supported_backends
    return {f"SpikingJelly ({name})": peer_of("LIF", backend=name)[1] for name in wanted if name in offered}


def measure_network(case: NetworkCase, network: networks.Network, target: Target) -> dict[str, Any]:
    """Median milliseconds of a network by implementation, for inference and a training step.

    "mean difference" is that of the outputs from the net's own, relative to their mean. Other algorithms for the
    convolutions round differently, which can flip spikes.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    x_seq = torch.rand(case.T, case.N, *network[1], device=target.device)
    runs = networks.runs_of(network, x_seq)
    net: Any = runs["snnfx"][1]
    compiled = target.compiled(net)
    runs["snnfx, compiled"] = (compiled, net)
    last = snnfx.convert(_channels_last(runs["stepped"][1]), example_inputs=x_seq[0])
    runs["snnfx, channels-last"] = (last, last)
    x_last = x_seq.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x_seq.shape[:2])
    failed: dict[str, str] = {}
    result: dict[str, Any] = {"case": asdict(case), "failed": failed}
    for kind, make in (("inference", networks.inference_call), ("training", networks.training_call)):
        sides: Calls = {name: make(*run, x_last if run[1] is last else x_seq) for name, run in runs.items()}
        sides = working(sides, failed, kind)
        if not target.interpreted and case.N <= SMALL_BATCH and "snnfx" in sides:
            graphs = captured({"snnfx": sides["snnfx"]}, failed, kind, 1)
            if graphs:
                sides["snnfx, CUDA graph"] = graphs["snnfx"]
        result[kind] = target.times(sides)
    failed.update(not_kernels(net))
    net.eval()
    with torch.no_grad():
        y_seq = net(x_seq)
        scale = y_seq.abs().mean().clamp_min(torch.finfo(y_seq.dtype).tiny)
        result["mean difference"] = {
            name: float((runs[name][0](x_seq) - y_seq).abs().mean() / scale)
            for name in ("stepped", "snnfx, compiled", "snnfx, channels-last")
            if name in result["inference"] and not runs[name][1].eval().training
        }
    return result


def _channels_last(model: torch.nn.Module) -> torch.nn.Module:
    moved: torch.nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    snnfx.functional.reset_net(moved)
    return moved


def working(sides: Calls, failed: dict[str, str], kind: str) -> Calls:
    """The sides whose first call raises nothing; it also compiles. The reasons of the others are recorded."""
    found: Calls = {}
    for name, call in sides.items():
        try:
            call()
        except Exception as error:
            failed[f"{name}, {kind}"] = f"{type(error).__name__}: {_first_line(str(error))}"
        else:
            found[name] = call
    return found


def captured(sides: Calls, failed: dict[str, str], kind: str, calls: int) -> Calls:
    """Functions that replay calls from CUDA graphs; the reasons of those that cannot be captured are recorded."""

    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        # Capturing refuses first calls, which allocate and compile, and calls on the default stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    found: Calls = {}
    for name, call in sides.items():
        try:
            found[name] = capture(call)
        except Exception as error:
            failed[f"{name}, {kind}, CUDA graph"] = f"{type(error).__name__}: {_first_line(str(error))}"
    return found


def not_kernels(net: Any) -> dict[str, str]:
    """By region, the reason why a loop of the net did not run a Triton kernel."""
    found: dict[str, str] = {}
    loops = {name: region.kernels for name, region in net.region_modules().items() if hasattr(region, "kernels")}
    for name, kernels in loops.items():
        if kernels is None:
            found[f"kernel of {name}"] = "the loop has no kernel"
            continue
        if kernels.refusal or kernels.in_use is None:
            found[f"kernel of {name}"] = kernels.refusal or "no kernel ran"
        elif not isinstance(kernels.in_use.back_end, TritonBackEnd):
            found[f"kernel of {name}"] = f"{type(kernels.in_use.back_end).__name__} ran, not Triton"
    return found if loops else {"kernels": "the net has no loop"}


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0][:300]
