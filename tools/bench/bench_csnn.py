"""Time a convolutional SNN: single-step model, converted net, compiled net, and SpikingJelly.

    python tools/bench/bench_csnn.py [--repeats 9] [--compile] [--json FILE]

The network has two conv-BN-LIF-pool blocks of 64 channels and two fully connected spiking layers, on 28x28 images. All
implementations have the same weights, inputs, threads and malloc settings. They alternate; the results are medians and
the speed-up over the single-step model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snnfx
from snnfx.functional import reset_net

CASES = ((4, 32), (16, 1))


def single_step_model() -> nn.Module:
    """The CSNN for one time step."""

    def block(channels_in: int) -> list[nn.Module]:
        lif = snnfx.neuron.LIFNode(tau=2.0, surrogate_function=snnfx.surrogate.ATan(), detach_reset=True)
        return [nn.Conv2d(channels_in, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), lif, nn.MaxPool2d(2)]

    def spiking() -> nn.Module:
        return snnfx.neuron.LIFNode(tau=2.0, surrogate_function=snnfx.surrogate.ATan(), detach_reset=True)

    return nn.Sequential(
        *block(1), *block(64), nn.Flatten(), nn.Linear(64 * 7 * 7, 256), spiking(), nn.Linear(256, 10), spiking()
    )


def spikingjelly_model(reference: nn.Module) -> nn.Module | None:
    """The same network in SpikingJelly's multi-step form, or None if it is not installed."""
    try:
        from spikingjelly.activation_based import functional, layer, neuron, surrogate
    except ImportError:
        return None

    def lif() -> nn.Module:
        return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)

    def block(channels_in: int) -> list[nn.Module]:
        conv = layer.Conv2d(channels_in, 64, 3, padding=1, bias=False)
        return [conv, layer.BatchNorm2d(64), lif(), layer.MaxPool2d(2)]

    model = nn.Sequential(
        *block(1), *block(64), layer.Flatten(), layer.Linear(64 * 7 * 7, 256), lif(), layer.Linear(256, 10), lif()
    )
    model.load_state_dict(reference.state_dict())
    functional.set_step_mode(model, "m")
    return model


Side = tuple[Callable[[Tensor], Tensor], nn.Module]


def sides(T: int, N: int, with_compile: bool) -> dict[str, Side]:
    """Each implementation, as a function from a sequence to its output (from the reset state), and its module."""
    torch.manual_seed(0)
    model = single_step_model()
    net = snnfx.convert(model, example_inputs=torch.rand(N, 1, 28, 28))

    def stepped(x_seq: Tensor) -> Tensor:
        reset_net(model)
        return torch.stack([model(x) for x in x_seq])

    found: dict[str, Side] = {"single-step": (stepped, model), "converted": (net, net)}
    if with_compile:
        found["compiled"] = (torch.compile(net, fullgraph=True), net)
    peer = spikingjelly_model(model)
    if peer is not None:
        from spikingjelly.activation_based import functional

        def multi_step(x_seq: Tensor) -> Tensor:
            functional.reset_net(peer)
            return peer(x_seq)

        found["SpikingJelly multi-step"] = (multi_step, peer)
    return found


def measure(T: int, N: int, repeats: int, with_compile: bool) -> dict[str, Any]:
    """Median milliseconds of inference and of a training step of each implementation; they alternate."""
    x_seq = torch.rand(T, N, 1, 28, 28)
    found = sides(T, N, with_compile)
    times: dict[str, dict[str, list[float]]] = {name: {"inference": [], "training": []} for name in found}
    for repeat in range(repeats + 2):
        for name, (run, module) in found.items():
            module.eval()
            with torch.no_grad():
                start = time.perf_counter()
                run(x_seq)
                inference = time.perf_counter() - start
            module.train()
            start = time.perf_counter()
            run(x_seq).sum().backward()
            training = time.perf_counter() - start
            module.zero_grad()
            if repeat >= 2:
                times[name]["inference"].append(inference * 1e3)
                times[name]["training"].append(training * 1e3)
    medians = {name: {kind: statistics.median(values) for kind, values in t.items()} for name, t in times.items()}
    return {"T": T, "N": N, "milliseconds": medians}


def show(result: dict[str, Any]) -> None:
    """Print a table of milliseconds and the speed-up over the single-step model."""
    base = result["milliseconds"]["single-step"]
    print(f"\nT={result['T']} N={result['N']}   {'inference':>20} {'training step':>24}")
    for name, t in result["milliseconds"].items():
        columns = [f"{t[kind]:10.1f} ms {base[kind] / t[kind]:6.2f}x" for kind in ("inference", "training")]
        print(f"  {name:<24}" + "   ".join(columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=9, help="rounds per median (default: 9)")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile(net)")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(f"torch {machine['torch']}, {machine['threads']} threads, {machine['machine']}")
    results = [measure(T, N, arguments.repeats, arguments.compile) for T, N in CASES]
    for result in results:
        show(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
