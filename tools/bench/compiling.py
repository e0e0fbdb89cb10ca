"""Measure how long torch.compile takes for a converted net and for SpikingJelly's multi-step form.

Times the first training step, including compilation, in a process with an empty compiler cache, for several numbers of
time steps. Also counts how many graphs are compiled for sequences of five different lengths.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import bench_csnn
import torch
from layers import NEURONS
from torch import Tensor, nn

import snnfx

__all__ = ["CASES", "LENGTHS", "QUICK", "CompileCase", "measure"]

LENGTHS = (4, 5, 8, 16, 33)


@dataclass(frozen=True)
class CompileCase:
    """A network ("LIF" or "CSNN") of a library, on sequences of T steps; T=0: all of `LENGTHS` in turn."""

    network: str
    side: str
    T: int


QUICK = (CompileCase("LIF", "snnfx", 4), CompileCase("LIF", "snnfx", 64))
CASES = (
    *(CompileCase(network, "snnfx", T) for network in ("LIF", "CSNN") for T in (4, 64, 0)),
    *(CompileCase("LIF", "SpikingJelly", T) for T in (4, 16)),
)


def measure(case: CompileCase, seconds: float) -> dict[str, Any]:
    """Seconds of the first training step, and the number of compiled graphs."""
    del seconds  # a first step cannot be repeated
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
