"""Benchmark whole networks: the stepped model, the converted net, SpikingJelly, and a lower bound.

The lower bound ("floor") is the time of the convolutions, linear layers, norms and pools alone: the network without its
neurons, with T folded into the batch, in the faster of the two memory formats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import bench_csnn
import memory_models
import torch
from timing import alternate
from torch import Tensor, nn

import snnfx
from snnfx.functional import reset_net

__all__ = [
    "CASES",
    "NETWORKS",
    "QUICK",
    "Network",
    "NetworkCase",
    "Runs",
    "inference_call",
    "measure",
    "runs_of",
    "runs_of_model",
    "training_call",
    "with_lower_bound",
    "without_neurons",
]


@dataclass(frozen=True)
class NetworkCase:
    """One benchmark case: a key of `NETWORKS`, on inputs `[T, N, ...]`."""

    network: str
    T: int
    N: int


def spiking_vgg11(multi_step: bool = False) -> nn.Module:
    """Eight convolutions with BatchNorm and LIF neurons, for images of 32x32 pixels."""
    if multi_step:
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        library: Any = layer

        def lif() -> nn.Module:
            made: nn.Module = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)
            return made

    else:
        library, lif = nn, memory_models.lif
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(library.MaxPool2d(2))
            continue
        assert isinstance(width, int)
        layers += [library.Conv2d(channels, width, 3, padding=1, bias=False), library.BatchNorm2d(width), lif()]
        channels = width
    model = nn.Sequential(*layers, library.Flatten(), library.Linear(512, 10))
    if multi_step:
        functional.set_step_mode(model, "m")
    return model


def _csnn(multi_step: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = bench_csnn.single_step_model()
    if not multi_step:
        return model
    peer = bench_csnn.spikingjelly_model(model)
    assert peer is not None
    return peer


Network = tuple[Callable[..., nn.Module], tuple[int, ...], bool]
"""Constructor, shape of a sample, and whether SpikingJelly has a multi-step form of it."""
Runs = dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]]
"""By implementation: a function of a sequence, and the module that it calls."""

NETWORKS: dict[str, Network] = {
    "CSNN": (_csnn, (1, 28, 28), True),
    "SEW-ResNet-18": (memory_models.sew_resnet18, (3, 64, 64), True),
    "Spiking-VGG-11": (spiking_vgg11, (3, 32, 32), True),
    "Spikformer-like": (memory_models.Spikformer, (3, 32, 32), False),
}

QUICK = (NetworkCase("CSNN", 4, 32), NetworkCase("CSNN", 16, 1))
CASES = (
    *(NetworkCase("CSNN", T, N) for T, N in ((4, 32), (16, 1), (16, 8))),
    *(NetworkCase("SEW-ResNet-18", T, N) for T, N in ((4, 4), (16, 1))),
    *(NetworkCase("Spiking-VGG-11", T, N) for T, N in ((4, 8), (16, 1))),
    *(NetworkCase("Spikformer-like", T, N) for T, N in ((4, 8), (16, 1))),
)


def measure(case: NetworkCase, seconds: float) -> dict[str, Any]:
    """Median milliseconds by implementation, for inference and a training step."""
    network = NETWORKS[case.network]
    x_seq = torch.rand(case.T, case.N, *network[1])
    runs = runs_of(network, x_seq)
    sides = {name: (inference_call(*run, x_seq), training_call(*run, x_seq)) for name, run in runs.items()}
    return {
        "case": asdict(case),
        "inference": with_lower_bound(alternate({name: calls[0] for name, calls in sides.items()}, seconds)),
        "training": with_lower_bound(alternate({name: calls[1] for name, calls in sides.items()}, seconds)),
    }


def runs_of(network: Network, x_seq: Tensor) -> Runs:
    """All implementations of a network with the same weights, on the device of the sequence."""
    make, _, has_peer = network
    model = make().to(x_seq.device)
    peer = make(multi_step=True).to(x_seq.device) if has_peer else None
    if peer is not None:
        peer.load_state_dict(model.state_dict())
    return runs_of_model(model, peer, x_seq)


def runs_of_model(model: nn.Module, peer: nn.Module | None, x_seq: Tensor) -> Runs:
    """A model in all implementations.

    Args:
        model: the step.
        peer: its multi-step form in SpikingJelly, with the same weights.
        x_seq: an input, on the device of the model.
    """
    net = snnfx.convert(model, example_inputs=x_seq[0])

    def stepped(x: Tensor) -> Tensor:
        reset_net(model)
        return torch.stack([model(step) for step in x])

    runs: Runs = {"stepped": (stepped, model), "snnfx": (net, net)}
    if peer is not None:
        from spikingjelly.activation_based import functional

        def multi_step(x: Tensor) -> Tensor:
            functional.reset_net(peer)
            y: Tensor = peer(x)
            return y

        runs["SpikingJelly"] = (multi_step, peer)
    bare = without_neurons(model)
    runs["floor"] = (lambda x: bare(x.flatten(0, 1)), bare)
    if x_seq.dim() == 5:
        last = copy.deepcopy(bare).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        runs["floor, channels-last"] = (
            lambda x: last(x.flatten(0, 1).contiguous(memory_format=torch.channels_last)),
            last,
        )
    return runs


def without_neurons(model: nn.Module) -> nn.Module:
    """A copy of the model with its neurons replaced by identities."""
    bare = copy.deepcopy(model)
    for parent in list(bare.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LIFNode":  # of snnfx or SpikingJelly
                setattr(parent, name, nn.Identity())
    return bare


def with_lower_bound(times: dict[str, float]) -> dict[str, float]:
    """Keep the lower of the two bounds; vectors have only one."""
    other = times.pop("floor, channels-last", times["floor"])
    return {**times, "floor": min(times["floor"], other)}


def inference_call(run: Callable[[Tensor], Tensor], module: nn.Module, x_seq: Tensor) -> Callable[[], Any]:
    def call() -> None:
        if module.training:
            module.eval()
        with torch.no_grad():
            run(x_seq)

    return call


def training_call(run: Callable[[Tensor], Tensor], module: nn.Module, x_seq: Tensor) -> Callable[[], Any]:
    parameters = list(module.parameters())

    def call() -> None:
        if not module.training:
            module.train()
        run(x_seq).sum().backward()
        for parameter in parameters:  # like optimizer.zero_grad()
            parameter.grad = None

    return call
