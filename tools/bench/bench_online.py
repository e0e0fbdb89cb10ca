"""Compare online training with SpikingJelly: time, memory and numerical difference.

    python tools/bench/bench_online.py [--repeats 9] [--only ottt|fptt|memory] [--json tools/results/online_cpu.json]

snnfx.online trains a converted net; SpikingJelly's functions train a model built from its OTTT modules. Both have the
same weights, inputs, loss, optimizer, threads and malloc settings. They alternate, and the ratio compares the medians
of a call on one batch. The learning rate is 0, so that both see the same spikes in every round (the optimizer step
still runs). Each case runs in a fresh process.

"difference" is the largest difference between the results of the two calls (gradients, or running averages for FPTT),
relative to the largest entry. It is measured in float64, where rounding makes no neuron fire in one library only, and
with average pooling: SpikingJelly pools the trace of the spikes, while snnfx traces the operand of the weight, and with
max-pooling these are different rules (they differ only in the weights directly after the pool).

Times are measured with the default malloc settings, which return large freed blocks to the system, so that new ones
cause page faults; and with settings that keep freed blocks, as `snnfx.tune_allocator()` does.

Peak memory is the growth of the process during one training call, with the default malloc settings, which keep small
freed blocks, and with settings that return all freed blocks, where the peak is the live memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import torch
from process_memory import peak_of
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
import snnfx.online

RESULTS = Path(__file__).resolve().parents[1] / "results" / "online_cpu.json"
ALPHA = 0.1
MEMORY_LENGTHS = (32, 256, 512)
MEMORY_CHUNK = 16
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Call = Callable[[], list[Tensor]]
"""Trains on one batch and returns the resulting gradients, or running averages for FPTT."""
Sides = dict[str, Call]


def lif() -> nn.Module:
    """Soft, detached reset; the input is not divided by tau."""
    return snnfx.neuron.LIFNode(
        tau=2.0, decay_input=False, v_reset=None, detach_reset=True, surrogate_function=snnfx.surrogate.Sigmoid()
    )


def peer_lif(online: bool) -> nn.Module:
    from spikingjelly.activation_based import neuron, surrogate

    make = neuron.OTTTLIFNode if online else neuron.LIFNode
    return make(tau=2.0, decay_input=False, v_reset=None, detach_reset=True, surrogate_function=surrogate.Sigmoid())


Neuron = Callable[[], nn.Module]
Pool = Callable[[int], nn.Module]


def csnn(neuron: Neuron, pool: Pool) -> list[nn.Module]:
    """The CSNN of tools/bench/bench_csnn.py: two conv-BN-LIF-pool blocks of 64 channels, two fully connected layers."""

    def block(channels_in: int) -> list[nn.Module]:
        conv = nn.Conv2d(channels_in, 64, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(64), neuron(), pool(2)]

    head = [nn.Flatten(), nn.Linear(64 * 7 * 7, 256), neuron(), nn.Linear(256, 10), neuron()]
    return [*block(1), *block(64), *head]


def mlp(neuron: Neuron, pool: Pool) -> list[nn.Module]:
    """64-128-128-10, the size of scikit-learn's digits."""
    return [nn.Linear(64, 128), neuron(), nn.Linear(128, 128), neuron(), nn.Linear(128, 10), neuron()]


NETS: dict[str, tuple[Callable[..., list[nn.Module]], tuple[int, ...]]] = {
    "CSNN": (csnn, (1, 28, 28)),
    "MLP": (mlp, (64,)),
}


@dataclass(frozen=True)
class Setting:
    """Network, batch and dtype of a case; the comparison of results uses another dtype and other pools."""

    net: str
    T: int
    N: int
    dtype: torch.dtype = torch.float32
    pool: Pool = nn.MaxPool2d

    def model(self, neuron: Neuron) -> nn.Sequential:
        return nn.Sequential(*NETS[self.net][0](neuron, self.pool)).to(self.dtype)

    def peer_model(self, online: bool) -> nn.Module:
        from spikingjelly.activation_based import layer

        layers = NETS[self.net][0](lambda: peer_lif(online), self.pool)
        return (layer.OTTTSequential(*layers) if online else nn.Sequential(*layers)).to(self.dtype)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Spikes `[T, N, ...]` and targets for ten neurons at each step, `[T, N, 10]`."""
        generator = torch.Generator().manual_seed(self.T)
        x_seq = torch.rand(self.T, self.N, *NETS[self.net][1], generator=generator) < 0.3
        labels = torch.randint(10, (self.N,), generator=generator)
        return x_seq.to(self.dtype), F.one_hot(labels, 10).to(self.dtype).expand(self.T, self.N, 10)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def ottt_sides(setting: Setting) -> Sides:
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.learning import online_learning

    x_seq, target = (s.transpose(0, 1).contiguous() for s in setting.batch())
    model = setting.model(lif)
    ours = snnfx.convert(model, example_inputs=x_seq[:, 0])
    peer = setting.peer_model(online=True)
    peer.load_state_dict(model.state_dict())
    optimizers = {module: torch.optim.SGD(module.parameters(), lr=0.0) for module in (ours, peer)}

    def run_peer() -> list[Tensor]:
        online_learning.ottt_online_training(peer, optimizers[peer], x_seq, target, F.mse_loss, False)
        functional.reset_net(peer)
        return gradients_of(peer)

    def run_ours() -> list[Tensor]:
        snnfx.online.ottt_online_training(ours, optimizers[ours], x_seq, target, F.mse_loss, False)
        return gradients_of(ours)

    return {"snnfx": run_ours, "SpikingJelly": run_peer}


def fptt_sides(setting: Setting) -> Sides:
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.learning import online_learning

    x_seq, target = setting.batch()
    model = setting.model(lif)
    ours = snnfx.convert(model, example_inputs=x_seq[0])
    peer = setting.peer_model(online=False)
    peer.load_state_dict(model.state_dict())
    optimizers = {module: torch.optim.SGD(module.parameters(), lr=0.0) for module in (ours, peer)}

    def run_peer() -> list[Tensor]:
        w_ra = online_learning.fptt_online_training_init_w_ra(optimizers[peer])
        online_learning.fptt_online_training(peer, optimizers[peer], x_seq, target, F.mse_loss, ALPHA, w_ra)
        functional.reset_net(peer)
        return w_ra

    def run_ours() -> list[Tensor]:
        w_ra = snnfx.online.fptt_online_training_init_w_ra(optimizers[ours])
        snnfx.online.fptt_online_training(ours, optimizers[ours], x_seq, target, F.mse_loss, ALPHA, w_ra)
        return w_ra

    return {"snnfx": run_ours, "SpikingJelly": run_peer}


CASES: tuple[tuple[str, Callable[[Setting], Sides], Setting, float], ...] = (
    ("OTTT-A", ottt_sides, Setting("CSNN", 16, 8), 3.0),
    ("OTTT-A", ottt_sides, Setting("MLP", 32, 16), 8.0),
    ("OTTT-A", ottt_sides, Setting("MLP", 128, 16), 8.0),
    ("FPTT", fptt_sides, Setting("MLP", 32, 16), 1.5),
    ("FPTT", fptt_sides, Setting("MLP", 128, 16), 1.5),
)


def difference(make: Callable[[Setting], Sides], setting: Setting) -> float:
    """Largest difference between the results of the two libraries, relative to the largest entry."""
    torch.manual_seed(0)
    sides = make(replace(setting, dtype=torch.float64, pool=nn.AvgPool2d))
    ours, theirs = (run() for run in sides.values())
    largest = max(float(value.abs().max()) for value in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def measure(
    rule: str, make: Callable[[Setting], Sides], setting: Setting, target: float, repeats: int
) -> dict[str, Any]:
    relative_difference = difference(make, setting)
    torch.manual_seed(0)
    sides = make(setting)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        order = list(sides.items()) if repeat % 2 else list(sides.items())[::-1]
        for name, run in order:
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rule": rule,
        "net": setting.net,
        "T": setting.T,
        "N": setting.N,
        "milliseconds": medians,
        "ratio": medians["SpikingJelly"] / medians["snnfx"],
        "target": target,
        "difference": relative_difference,
    }


@contextlib.contextmanager
def fresh_processes(
    context: SpawnContext, settings: dict[str, str], first: Callable[[], Any] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Yield an executor that runs each call in a fresh process.

    Args:
        context: the multiprocessing start method.
        settings: environment variables for malloc.
        first: function that each process calls first.
    """
    saved = dict(os.environ)
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=first, max_tasks_per_child=1) as fresh:
            yield fresh
    finally:
        for key in settings:
            os.environ.pop(key)
        os.environ.update(saved)


def peak_of_one_call(T: int, N: int, chunk: int) -> float:
    """Peak memory, in MiB, of one OTTT-A training call; call it in a fresh process."""
    torch.manual_seed(0)
    setting = Setting("CSNN", T, N)
    x_seq, target = setting.batch()
    net = snnfx.convert(setting.model(lif), example_inputs=x_seq[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    trainer = snnfx.online.Trainer(net, snnfx.online.OTTT_A, optimizer, F.mse_loss, chunk=chunk)
    return peak_of(lambda: trainer.step(x_seq, target)) / 2**20


def measure_memory(context: SpawnContext) -> dict[str, Any]:
    """Peak memory by T, with the default malloc settings and with settings that return all freed blocks."""
    peaks: dict[str, dict[int, float]] = {}
    for name, settings in (("default", {}), ("returns freed blocks", RETURN_FREED)):
        with fresh_processes(context, settings) as fresh:
            peaks[name] = {T: fresh.submit(peak_of_one_call, T, 8, MEMORY_CHUNK).result() for T in MEMORY_LENGTHS}
    return {"net": "CSNN", "N": 8, "chunk": MEMORY_CHUNK, "peak_mib": peaks}


def show_memory(result: dict[str, Any]) -> None:
    print(f"  peak memory of OTTT-A, CSNN, N={result['N']}, chunk {result['chunk']}")
    for name, peaks in result["peak_mib"].items():
        shown = "   ".join(f"T={T} {peak:.0f} MiB" for T, peak in peaks.items())
        growth = peaks[MEMORY_LENGTHS[-1]] / peaks[MEMORY_LENGTHS[0]]
        print(
            f"    malloc {name:<24} {shown}   T={MEMORY_LENGTHS[-1]} / T={MEMORY_LENGTHS[0]}: {growth:.2f}x", flush=True
        )


def show(result: dict[str, Any]) -> None:
    t = result["milliseconds"]
    print(
        f"  {result['rule']:<7} {result['net']:<5} T={result['T']:<4} N={result['N']:<3} snnfx {t['snnfx']:8.1f} ms"
        f"   SpikingJelly {t['SpikingJelly']:8.1f} ms   {result['ratio']:5.2f}x (target {result['target']}x)"
        f"   difference {result['difference']:.0e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=9, help="rounds per median (default: 9)")
    parser.add_argument("--only", choices=("ottt", "fptt", "memory"), help="run only this part")
    parser.add_argument("--json", type=Path, help=f"file for the results, e.g. {RESULTS}")
    arguments = parser.parse_args()
    machine = {
        "torch": torch.__version__,
        "spikingjelly": importlib.metadata.version("spikingjelly"),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    found: dict[str, Any] = {"machine": machine, "cases": []}
    context = multiprocessing.get_context("spawn")
    for name, first in (("default", None), ("tuned", snnfx.tune_allocator)):
        if arguments.only == "memory":
            break
        print(f"  {name} malloc settings")
        with fresh_processes(context, {}, first) as fresh:
            for case in CASES:
                if arguments.only in (None, case[0].split("-")[0].lower()):
                    result = fresh.submit(measure, *case, arguments.repeats).result()
                    found["cases"].append({"malloc": name, **result})
                    show(result)
    if arguments.only in (None, "memory") and sys.platform == "linux":
        found["memory"] = measure_memory(context)
        show_memory(found["memory"])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
