"""Benchmark one layer of neurons over a sequence: snnfx, other libraries, and the memory-bandwidth bound.

The same kind of neuron runs converted by snnfx and in the fastest form of its own library (multi-step, or stepped). The
bound for the forward pass is one pass over the sequence, `torch.add(x, 1, out=y)`. Forward and backward together make
six reads or writes of a sequence, like three passes: read the input, write the output and the saved tensor, read the
saved tensor and the gradient of the output, write the gradient of the input. "Kernels
alone" runs the generated kernels of the same call on the same tensors, without the operator and autograd around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from timing import alternate
from torch import Tensor, nn

import snnfx
from snnfx.functional import reset_net
from snnfx.lowering.elementwise.cpp.cpp_launch import CppBackEnd

__all__ = ["CASES", "NEURONS", "QUICK", "LayerCase", "inference_call", "measure", "peer_of", "training_call"]


@dataclass(frozen=True)
class LayerCase:
    """One benchmark case.

    Args:
        neuron: a key of `NEURONS`.
        T: number of time steps.
        elements: number of neurons.
        compiled: whether to measure SpikingJelly under torch.compile as well.
    """

    neuron: str
    T: int
    elements: int
    compiled: bool = False


class Bursting(snnfx.MemoryModule):
    """A user-defined neuron whose threshold grows with every spike and decays."""

    v: Tensor
    threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self.register_memory("threshold", 1.0)
        self.surrogate = snnfx.surrogate.ATan()

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.9 * self.v + x
        spike: Tensor = self.surrogate(self.v - self.threshold)
        self.threshold = 1.0 + 0.8 * (self.threshold - 1.0) + 0.2 * spike
        self.v = self.v - self.threshold * spike
        return spike


def _spikingjelly(name: str, **options: Any) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    made: nn.Module = getattr(neuron, name)(surrogate_function=surrogate.ATan(), detach_reset=True, **options)
    return made


def _snntorch() -> nn.Module:
    import snntorch

    made: nn.Module = snntorch.Leaky(beta=0.9, init_hidden=True, spike_grad=snntorch.surrogate.atan())
    return made


class _Norse(nn.Module):
    """Norse's cell, called with its state as an optional second argument."""

    def __init__(self) -> None:
        super().__init__()
        import norse.torch

        self.cell, self.state = norse.torch.LIFCell(), None

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.cell(x, state)
        return y, state


NEURONS: dict[str, Callable[[], nn.Module]] = {
    "IF": lambda: _spikingjelly("IFNode"),
    "LIF": lambda: _spikingjelly("LIFNode", tau=2.0),
    "LIF, soft reset": lambda: _spikingjelly("LIFNode", tau=2.0, v_reset=None),
    "PLIF": lambda: _spikingjelly("ParametricLIFNode", init_tau=2.0),
    "Leaky (snnTorch)": _snntorch,
    "LIFCell (Norse)": _Norse,
    "user's own": Bursting,
}

K, M = 1 << 10, 1 << 20
QUICK = (LayerCase("LIF", 16, 256 * K), LayerCase("user's own", 16, 256 * K))
CASES = (
    *(LayerCase("LIF", T, 256 * K) for T in (4, 16, 64, 256)),
    *(LayerCase("LIF", 16, elements) for elements in (16 * K, 64 * K, 512 * K, 2 * M)),
    *(LayerCase(name, 16, 256 * K) for name in NEURONS if name != "LIF"),
)


def measure(case: LayerCase, seconds: float) -> dict[str, Any]:
    """Median milliseconds by implementation: forward under no_grad, and forward with backward."""
    torch.manual_seed(0)
    neuron = NEURONS[case.neuron]()
    shape = (case.T, 1, case.elements)
    x_seq, above = 1.2 * torch.rand(shape), torch.rand(shape)
    net = snnfx.convert(neuron, example_inputs=x_seq[0])
    runs: dict[str, Callable[[Tensor], Tensor]] = {"snnfx": lambda x: _first(net(x))}
    peer, run = peer_of(case.neuron)
    runs[peer] = run
    if case.compiled:
        runs["SpikingJelly, torch.compile"] = _compiled(case.neuron)
    forward: dict[str, Callable[[], Any]] = {}
    training: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        forward[name] = inference_call(run, x_seq)
        training[name] = training_call(run, x_seq, above)
    forward["kernels alone"] = _kernels_of(forward["snnfx"])
    training["kernels alone"] = _kernels_of(training["snnfx"])
    out, saved, grad = (torch.empty_like(x_seq) for _ in range(3))
    forward["one pass"] = lambda: torch.add(x_seq, 1, out=out)

    def three_passes() -> None:
        torch.add(x_seq, 1, out=out)
        torch.add(above, 1, out=saved)
        torch.add(saved, 1, out=grad)

    training["three passes"] = three_passes
    return {
        "case": asdict(case),
        "peer": peer,
        "forward": alternate(forward, seconds),
        "training": alternate(training, seconds),
    }


def _kernels_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that runs only the generated kernels of a call, on the same tensors."""
    runs: list[Callable[[], Any]] = []
    run = CppBackEnd.run

    def recorded(self: CppBackEnd, *args: Any) -> None:
        runs.append(lambda: run(self, *args))
        run(self, *args)

    call()  # builds the kernels
    with mock.patch.object(CppBackEnd, "run", recorded):
        call()

    def run_kernels() -> None:
        for kernel in runs:
            kernel()

    return run_kernels


def _first(y: Any) -> Tensor:
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


def inference_call(run: Callable[[Tensor], Tensor], x_seq: Tensor) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            run(x_seq)

    return call


def training_call(run: Callable[[Tensor], Tensor], x_seq: Tensor, above: Tensor) -> Callable[[], Any]:
    def call() -> None:
        x = x_seq.detach().requires_grad_()
        torch.autograd.grad(run(x), x, above)

    return call


def peer_of(name: str, **settings: Any) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The fastest way of the neuron's own library to run a sequence, with its name.

    Args:
        name: a key of `NEURONS`.
        settings: attributes of the neuron, set before its first call.
    """
    neuron = NEURONS[name]()
    if type(neuron).__module__.startswith("spikingjelly."):
        neuron.step_mode = "m"  # type: ignore[assignment]
        for key, value in settings.items():
            setattr(neuron, key, value)

        def multi_step(x_seq: Tensor) -> Tensor:
            neuron.reset()  # type: ignore[operator]
            y: Tensor = neuron(x_seq)
            return y

        return "SpikingJelly", multi_step

    def stepped(x_seq: Tensor) -> Tensor:
        reset_net(neuron)
        return torch.stack([_first(neuron(x)) for x in x_seq])

    def stepped_with_state(x_seq: Tensor) -> Tensor:
        state, outputs = None, []
        for x in x_seq:
            y, state = neuron(x, state)
            outputs.append(y)
        return torch.stack(outputs)

    return "stepped", stepped_with_state if isinstance(neuron, _Norse) else stepped


def _compiled(name: str) -> Callable[[Tensor], Tensor]:
    neuron = NEURONS[name]()
    neuron.step_mode = "m"  # type: ignore[assignment]
    compiled = torch.compile(neuron)

    def run(x_seq: Tensor) -> Tensor:
        neuron.reset()  # type: ignore[operator]
        y: Tensor = compiled(x_seq)
        return y

    return run
