"""Measure how long torch.compile takes, and how fast compiled nets are.

Times the first training step, including compilation, in a process with an empty compiler cache, for several numbers of
time steps: of a converted net, and of SpikingJelly's multi-step form. Also counts how many graphs are compiled for
sequences of five different lengths. Then compares calls of compiled nets with calls of the same nets uncompiled, and
with a compiled operator that has the same arguments and computes nothing: the time of the compiler's own code in each
call, with caches that the other sides emptied.
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
    """Median milliseconds of the compiled net ("snnfx"), of the net and of `EmptyOperator`; inference and training."""
    torch.manual_seed(0)
    make, sample, _ = networks.NETWORKS.get(case.network, (_mlp, (512,), False))
    x_seq = torch.rand(case.T, case.N, *sample)
    net = snnfx.convert(make(), example_inputs=x_seq[0])
    with torch.no_grad():
        empty = EmptyOperator(net, tuple(net.eval()(x_seq).shape))
    runs: dict[str, tuple[Any, nn.Module]] = {
        "snnfx": (torch.compile(net, fullgraph=True), net),
        "net": (net, net),
        "compiler": (torch.compile(empty, fullgraph=True), empty),
    }
    training = {name: networks.training_call(*run, x_seq) for name, run in runs.items()}
    inference = {name: networks.inference_call(*run, x_seq) for name, run in runs.items()}
    return {
        "case": asdict(case),
        "inference": alternate(inference, seconds),
        "training": alternate(training, seconds),
    }


class EmptyOperator(nn.Module):
    """An operator with the parameters and buffers of a module that computes nothing.

    Args:
        like: the module.
        shape: the shape of the result.
    """

    def __init__(self, like: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(like.parameters())
        for i, buffer in enumerate(like.buffers()):
            self.register_buffer(f"buffer_{i}", buffer)
        self.count, self.shape = len(list(like.buffers())), list(shape)

    def forward(self, x: Tensor) -> Tensor:
        buffers = [getattr(self, f"buffer_{i}") for i in range(self.count)]
        y: Tensor = _compute_nothing(x, list(self.weights), buffers, self.shape)
        return y


@torch.library.custom_op("snnfx_bench::compute_nothing", mutates_args=())
def _compute_nothing(x: Tensor, weights: list[Tensor], buffers: list[Tensor], shape: list[int]) -> Tensor:
    return x.new_empty(shape)


@torch.library.custom_op("snnfx_bench::compute_no_gradient", mutates_args=())
def _compute_no_gradient(grad: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


@_compute_nothing.register_fake
def _(x: Tensor, weights: list[Tensor], buffers: list[Tensor], shape: list[int]) -> Tensor:
    return x.new_empty(shape)


@_compute_no_gradient.register_fake
def _(grad: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])
    ctx.buffers = len(inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return None, _compute_no_gradient(grad, list(ctx.saved_tensors)), [None] * ctx.buffers, None


_compute_nothing.register_autograd(_backward, setup_context=_save_weights)


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
