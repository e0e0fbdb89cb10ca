"""Time a recurrent LIF layer: stepped, converted with and without kernels, SpikingJelly, snnTorch.

    python tools/bench/bench_recurrent.py [--steps 100 1000] [--neurons 128 256] [--batch 32] [--rate 0.1]
        [--repeats 7] [--memory] [--json FILE]

The network is Linear - recurrent LIF - Linear, where a Linear layer feeds the spikes back to the LIF input. All
implementations have the same sizes, inputs, threads and malloc settings, but each library has its own LIF equations.
They alternate, with a short pause between them; the results are medians and the speed-up over the stepped model.
--memory measures the peak memory of a training step in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import snnfx
from snnfx.functional import reset_net

INPUTS, OUTPUTS, BATCH = 64, 10, 32
PAUSE = 0.02
"""Seconds between two timings."""

Side = tuple[Callable[[Tensor], Tensor], nn.Module]


class Recurrent(nn.Module):
    """The network for one time step.

    Args:
        neurons: number of hidden neurons.
    """

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.input = nn.Linear(INPUTS, neurons)
        self.back = nn.Linear(neurons, neurons)
        self.lif = snnfx.neuron.LIFNode(tau=2.0, surrogate_function=snnfx.surrogate.ATan(), detach_reset=True)
        self.output = nn.Linear(neurons, OUTPUTS)
        self.spike: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """One step: `[N, INPUTS]` to `[N, OUTPUTS]`."""
        if self.spike is None:
            self.spike = torch.zeros(x.shape[0], self.back.in_features)
        self.spike = self.lif(self.input(x) + self.back(self.spike))
        return self.output(self.spike)  # type: ignore[no-any-return]


def set_rate(model: Recurrent, x_seq: Tensor, rate: float) -> float:
    """Shift the bias of the input until the neurons fire at a rate; returns the rate.

    Args:
        model: the network.
        x_seq: the inputs.
        rate: spikes per neuron and step.
    """
    measured = 0.0
    for _ in range(30):
        reset_net(model)
        model.spike = None
        spikes: list[Tensor] = []
        with torch.no_grad():
            for x in x_seq[:100]:
                model(x)
                assert model.spike is not None
                spikes.append(model.spike.mean())
        measured = float(torch.stack(spikes).mean())
        model.input.bias.data.add_(0.5 * (rate - measured))
    reset_net(model)
    model.spike = None
    return measured


def stepped(neurons: int) -> Side:
    """The model in a Python loop."""
    model = Recurrent(neurons)

    def run(x_seq: Tensor) -> Tensor:
        reset_net(model)
        model.spike = None
        return torch.stack([model(x) for x in x_seq])

    return run, model


def converted(neurons: int, lower: str | None = "auto") -> Side:
    """The model converted by snnfx."""
    net = snnfx.convert(Recurrent(neurons), example_inputs=torch.rand(BATCH, INPUTS), lower=lower)
    return net, net


def spikingjelly(neurons: int) -> Side:
    """SpikingJelly's container for recurrent layers, in multi-step mode."""
    from spikingjelly.activation_based import functional, layer, neuron
    from spikingjelly.activation_based import surrogate as sj_surrogate

    lif = neuron.LIFNode(tau=2.0, surrogate_function=sj_surrogate.ATan(), detach_reset=True)
    model = nn.Sequential(
        layer.Linear(INPUTS, neurons),
        layer.LinearRecurrentContainer(lif, neurons, neurons),
        layer.Linear(neurons, OUTPUTS),
    )
    functional.set_step_mode(model, "m")
    functional.set_step_mode(model[1].sub_module, "s")

    def run(x_seq: Tensor) -> Tensor:
        functional.reset_net(model)
        return model(x_seq)  # type: ignore[no-any-return]

    return run, model


def snntorch(neurons: int) -> Side:
    """snnTorch's recurrent neuron in a Python loop."""
    import snntorch as snn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = nn.Linear(INPUTS, neurons)
            self.lif = snn.RLeaky(beta=0.5, linear_features=neurons)
            self.output = nn.Linear(neurons, OUTPUTS)

    model = Model()

    def run(x_seq: Tensor) -> Tensor:
        spike, potential = model.lif.init_rleaky()
        outputs = []
        for x in x_seq:
            spike, potential = model.lif(model.input(x), spike, potential)
            outputs.append(model.output(spike))
        return torch.stack(outputs)

    return run, model


SIDES: dict[str, Callable[[int], Side]] = {
    "stepped": stepped,
    "converted, lower=None": lambda neurons: converted(neurons, None),
    "converted": converted,
    "SpikingJelly multi-step": spikingjelly,
    "snnTorch stepped": snntorch,
}


def available(neurons: int) -> dict[str, Side]:
    """The implementations whose packages are installed."""
    found: dict[str, Side] = {}
    for name, make in SIDES.items():
        torch.manual_seed(0)
        try:
            found[name] = make(neurons)
        except ImportError:
            print(f"  skipped: {name} is not installed")
    return found


def measure(T: int, neurons: int, repeats: int, batch: int = BATCH, rate: float = 0.1) -> dict[str, Any]:
    """Median milliseconds of inference and of a training step of each implementation; they alternate."""
    x_seq = torch.rand(T, batch, INPUTS)
    found = available(neurons)
    model = found["stepped"][1]
    assert isinstance(model, Recurrent)
    measured = set_rate(model, x_seq, rate)
    for name in ("converted", "converted, lower=None"):
        found[name][1].load_state_dict(model.state_dict())
    times: dict[str, dict[str, list[float]]] = {name: {"inference": [], "training": []} for name in found}
    for repeat in range(repeats + 1):
        for name, (run, module) in found.items():
            with torch.no_grad():
                run(x_seq)  # the first call after a pause wakes the threads
                start = time.perf_counter()
                run(x_seq)
                inference = time.perf_counter() - start
            start = time.perf_counter()
            run(x_seq).square().mean().backward()
            training = time.perf_counter() - start
            module.zero_grad()
            time.sleep(PAUSE)
            if repeat:
                times[name]["inference"].append(inference * 1e3)
                times[name]["training"].append(training * 1e3)
    medians = {name: {kind: statistics.median(values) for kind, values in t.items()} for name, t in times.items()}
    return {"T": T, "N": batch, "neurons": neurons, "rate": measured, "milliseconds": medians}


def peak_of(name: str, T: int, neurons: int) -> None:
    """Print by how many megabytes two training steps raise the peak memory of this process."""
    run, _ = SIDES[name](neurons)
    x_seq = torch.rand(T, BATCH, INPUTS)
    run(x_seq[:4]).square().mean().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        run(x_seq).square().mean().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peaks(T: int, neurons: int) -> dict[str, float]:
    """Peak megabytes of training for each implementation, each in a fresh process."""
    found = {}
    for name in SIDES:
        command = [sys.executable, __file__, "--peak-of", name, "--steps", str(T), "--neurons", str(neurons)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[name] = float(done.stdout.split()[-1])
    return found


def show(result: dict[str, Any]) -> None:
    """Print a table of milliseconds and the speed-up over the stepped model."""
    base = result["milliseconds"]["stepped"]
    case = f"T={result['T']} N={result['N']} neurons={result['neurons']} firing {result['rate']:.1%}"
    print(f"\n{case:<38}{'inference':>12} {'training step':>24}")
    for name, t in result["milliseconds"].items():
        columns = [f"{t[kind]:10.1f} ms {base[kind] / t[kind]:6.2f}x" for kind in ("inference", "training")]
        memory = f"{result['megabytes'][name]:10.0f} MB" if name in result.get("megabytes", {}) else ""
        print(f"  {name:<24}" + "   ".join(columns) + memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000], help="sequence lengths")
    parser.add_argument("--neurons", type=int, nargs="+", default=[128, 256], help="sizes of the hidden layer")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"samples (default: {BATCH})")
    parser.add_argument("--rate", type=float, default=0.1, help="firing rate of the network (default: 0.1)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per median (default: 7)")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of a training step")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if arguments.peak_of:
        peak_of(arguments.peak_of, arguments.steps[0], arguments.neurons[0])
        return
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(f"torch {machine['torch']}, {machine['threads']} threads, {machine['machine']}")
    results = []
    for neurons in arguments.neurons:
        for T in arguments.steps:
            results.append(measure(T, neurons, arguments.repeats, arguments.batch, arguments.rate))
            if arguments.memory:
                results[-1]["megabytes"] = peaks(T, neurons)
            show(results[-1])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
