"""Measure how long torch.compile takes, and how fast compiled nets are.

Times the first training step, including compilation, in a process with an empty compiler cache, for several numbers of
time steps: of a converted net, and of SpikingJelly's multi-step form. Also counts how many graphs are compiled for
sequences of five different lengths. Then compares calls of compiled nets with calls of the same nets uncompiled.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import bench_csnn
import networks
import torch
from layers import NEURONS
from timing import alternate
from torch import Tensor, nn

import snnfx

__all__ = ["CASES", "LENGTHS", "QUICK", "CompileCase", "SpeedCase", "measure"]

LENGTHS = (4, 5, 8, 16, 33)


@dataclass(frozen=True)
class CompileCase:
    """A network ("LIF" or "CSNN") of a library, on sequences of T steps; T=0: all of `LENGTHS` in turn."""

    network: str
    side: str
    T: int


@dataclass(frozen=True)
class SpeedCase:
    """Calls of a compiled net and of the net: a key of `networks.NETWORKS` or "MLP", on inputs `[T, N, ...]`."""

    network: str
    T: int
    N: int


QUICK: tuple[CompileCase | SpeedCase, ...] = (
    CompileCase("LIF", "snnfx", 4),
    CompileCase("LIF", "snnfx", 64),
    SpeedCase("MLP", 16, 8),
)
CASES: tuple[CompileCase | SpeedCase, ...] = (
    *(CompileCase(network, "snnfx", T) for network in ("LIF", "CSNN") for T in (4, 64, 0)),
    *(CompileCase("LIF", "SpikingJelly", T) for T in (4, 16)),
    *(SpeedCase("CSNN", T, N) for T, N in ((4, 32), (16, 1))),
    *(SpeedCase("SEW-ResNet-18", T, N) for T, N in ((4, 4), (16, 1))),
    *(SpeedCase("Spikformer-like", T, N) for T, N in ((4, 8), (16, 1))),
    SpeedCase("MLP", 16, 64),
)


def measure(case: CompileCase | SpeedCase, seconds: float) -> dict[str, Any]:
    """The results of a case: see `_measure_speed` and `_measure_compilation`."""
    return _measure_speed(case, seconds) if isinstance(case, SpeedCase) else _measure_compilation(case)


def _measure_speed(case: SpeedCase, seconds: float) -> dict[str, Any]:
    """Median milliseconds of the compiled net ("snnfx") and of the net, for inference and a training step."""
    torch.manual_seed(0)
    make, sample, _ = networks.NETWORKS.get(case.network, (_mlp, (512,), False))
    x_seq = torch.rand(case.T, case.N, *sample)
    net = snnfx.convert(make(), example_inputs=x_seq[0])
    runs: dict[str, Any] = {"snnfx": torch.compile(net, fullgraph=True), "net": net}
    training = {name: networks.training_call(run, net, x_seq) for name, run in runs.items()}
    inference = {name: networks.inference_call(run, net, x_seq) for name, run in runs.items()}
    return {
        "case": asdict(case),
        "inference": alternate(inference, seconds),
        "training": alternate(training, seconds),
    }


def _mlp() -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Linear(512, 512), NEURONS["LIF"]())]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _measure_compilation(case: CompileCase) -> dict[str, Any]:
    """Seconds of the first training step, and the number of compiled graphs."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        run, shape = _model_and_shape(case)
        graphs = 0

        def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            nonlocal graphs
            graphs += 1
            from torch._inductor.compile_fx import compile_fx

            return cast(Callable[..., Any], compile_fx(graph, inputs))

        compiled = torch.compile(run, backend=counted, fullgraph=case.side == "snnfx")
        start = time.perf_counter()
        for T in [case.T] if case.T else LENGTHS:
            compiled(torch.rand(T, *shape)).sum().backward()
        return {"case": asdict(case), "seconds": time.perf_counter() - start, "graphs": graphs}


def _model_and_shape(case: CompileCase) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """The module to compile, and the input shape of one step."""
    if case.network == "CSNN":
        shape: tuple[int, ...] = (8, 1, 28, 28)  # below T*N = 16 torch plans convolutions differently
        model: nn.Module = bench_csnn.single_step_model()
    else:
        shape = (16, 1024)
        model = nn.Sequential(nn.Linear(1024, 1024), NEURONS["LIF"]())
    if case.side == "snnfx":
        return snnfx.convert(model, example_inputs=torch.rand(shape)), shape
    from spikingjelly.activation_based import functional, layer

    peer = nn.Sequential(layer.Linear(1024, 1024), NEURONS["LIF"]())
    functional.set_step_mode(peer, "m")
    return peer, shape
