"""Compare predicted with measured memory, and training with SpikingJelly and its memopt.

    python tools/bench/bench_memory.py [--only predict|inference|train] [--json tools/results/memory_cpu.json]

Each memory result comes from a fresh process: the peak resident set during one call (VmHWM, reset before it) above the
resident set before it. Freed blocks of 64 KiB and more return to the system (`MALLOC_MMAP_THRESHOLD_`), so the resident
set is the live memory. Times come from other processes, in which the implementations alternate, once with the default
malloc settings and once with settings that keep freed blocks. Threads are pinned to cores (OMP_PROC_BIND), because the
scheduler of a virtual machine would add much noise.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MiB = 2**20
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
STEADY = {"OMP_PROC_BIND": "true"}
KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
TIMED = (("default", STEADY), ("keeping", {**STEADY, **KEEPING}))

PREDICTED = [
    (name, T, N, phase)
    for name, cases in {
        "CSNN": ((4, 32), (16, 8), (16, 32)),
        "SEW-ResNet-18": ((4, 4), (16, 4)),
        "U-Net": ((4, 8), (16, 4)),
        "Spikformer": ((4, 8), (16, 4)),
    }.items()
    for T, N in cases
    for phase in ("inference", "training", "selective", "regions")
]
SIDES = (
    "SpikingJelly", "memopt 1 neurons", "memopt 1 layers", "memopt 2",
    "plain", "selective", "half", "fifth", "least", "per step, every 2", "per step, every 4",
)  # fmt: skip
SHAPES = {"CSNN": (16, 32), "SEW-ResNet-18": (16, 4)}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def peak_of(run: Callable[[], Any]) -> int:
    """Peak resident set during a call, in bytes above the resident set before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def step_of(module: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def training_step(x_seq: Tensor) -> None:
        for p in module.parameters():
            p.grad = None
        run(x_seq).sum().backward()

    return training_step


def net_for(name: str, **options: Any) -> Any:
    from memory_models import MODELS

    import snnfx

    make, shape = MODELS[name]
    torch.manual_seed(0)
    return snnfx.convert(make(), example_inputs=torch.rand(2, *shape), **options), shape


def predict(name: str, T: int, N: int, phase: str) -> dict[str, Any]:
    """Predicted and measured bytes of one call."""
    from snnfx.emit.recompute_segments import RecomputePlan
    from snnfx.memory.memory_model import model_memory
    from snnfx.memory.timeline import inference_peak, training_peak
    from snnfx.memory.training_planner import packed_parts
    from snnfx.ops.buffer_pool import pool

    pool.limit = 0  # memory pooled for the next outputs is not live
    options: dict[str, Any] = {"checkpoint": phase if phase in ("selective", "regions") else None}
    net, shape = net_for(name, chunk=None, **options)
    x_seq = torch.rand(T, N, *shape)
    if phase == "inference":
        net.eval()

        def run() -> None:
            with torch.no_grad():
                net(x_seq)
    else:
        training_step = step_of(net, net)

        def run() -> None:
            training_step(x_seq)

    small = torch.rand(2, N, *shape)
    with torch.set_grad_enabled(phase != "inference"):
        y = net(small)
        if phase != "inference":
            y.sum().backward()
    del y
    net.zero_grad()
    start = time.perf_counter()
    if options["checkpoint"]:
        plan = net.recompute_plan(T, x_seq)
        planned = time.perf_counter() - start
        model = model_memory(net._executable, [x_seq], None, training=True, in_tiles=plan.packs)
    else:
        plan, model = RecomputePlan(), model_memory(net._executable, [x_seq], None, training=phase != "inference")
        planned = time.perf_counter() - start
    predicted = (
        inference_peak(model, T, hands_on=False).bytes
        if phase == "inference"
        else training_peak(model, T, plan, packed_parts(net._executable, model)).bytes
    )
    net(small[:, :1])  # compile the kernels for this shape
    measured = peak_of(run)
    return {"predicted": predicted, "measured": measured, "planning_ms": planned * 1e3}


def side_of(name: str, side: str, T: int, N: int) -> tuple[Callable[[Tensor], None], tuple[int, ...]]:
    """A training step of one implementation, and the shape of a sample."""
    from memory_models import MODELS, peer_of

    _, shape = MODELS[name]
    if side.startswith(("Spiking", "memopt")):
        from spikingjelly.activation_based import functional, memopt

        peer = peer_of(name)
        if side.startswith("memopt"):
            peer = optimized(memopt, peer, torch.rand(T, N, *shape), side)
            functional.reset_net(peer)

        def run(x: Tensor) -> Tensor:
            functional.reset_net(peer)
            return peer(x)

        return step_of(peer, run), shape
    options: dict[str, Any] = {"checkpoint": None}
    if side.startswith("per step"):
        # With per-step statistics, time can be split into segments.
        options = {"checkpoint": int(side.split()[-1]), "batch_norm": "per_step"}
    elif side in ("selective", "least"):
        options = {"checkpoint": {"least": "regions"}.get(side, side)}
    elif side in ("half", "fifth"):
        # The measured peak excludes the gradients of the parameters; a budget includes them.
        gradients = sum(p.numel() * p.element_size() for p in MODELS[name][0]().parameters())
        budget = int(int(os.environ["OF_PEER"]) * {"half": 0.5, "fifth": 0.2}[side])
        options = {"checkpoint": "auto", "memory_budget": budget + gradients}
    net, _ = net_for(name, chunk=None, **options)
    return step_of(net, net), shape


def optimized(memopt: Any, peer: nn.Module, x_seq: Tensor, side: str) -> nn.Module:
    """SpikingJelly's memopt; its levels above 1 search by measuring CUDA memory."""
    from spikingjelly.activation_based import functional, neuron

    targets = (neuron.BaseNode,) if "neurons" in side else (neuron.BaseNode, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)

    def example(model: nn.Module) -> Tensor:
        functional.reset_net(model)
        return model(x_seq)

    return memopt.optimize_memory(peer, targets, example, level=2 if "2" in side else 1)


def train(name: str, side: str, T: int, N: int) -> dict[str, Any]:
    """Peak bytes of a training step of one implementation."""
    start = time.perf_counter()
    step, shape = side_of(name, side, T, N)
    prepared = time.perf_counter() - start
    torch.manual_seed(0)
    x_seq = torch.rand(T, N, *shape)
    if not side.startswith(("Spiking", "memopt")):
        from snnfx.ops.buffer_pool import pool

        pool.limit = 0
    step(x_seq if side in ("half", "fifth") else x_seq[:, :1])
    return {"bytes": peak_of(lambda: step(x_seq)), "preparing_s": prepared}


def train_in_turns(name: str, sides: Sequence[str], T: int, N: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of a training step; the implementations alternate, so that machine load affects all."""
    steps = {side: side_of(name, side, T, N) for side in sides}
    torch.manual_seed(0)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side, (step, shape) in steps.items():
            x_seq = torch.rand(T, N, *shape)
            start = time.perf_counter()
            step(x_seq)
            if turn > 0:
                times[side].append((time.perf_counter() - start) * 1e3)
    return {side: statistics.median(found) for side, found in times.items()}


def inference_over(T: int, N: int) -> dict[str, Any]:
    """Peak memory of chunked inference and of streaming, without the input."""
    from snnfx.ops.buffer_pool import pool

    pool.limit = 0
    net, shape = net_for("CSNN")
    net.eval()
    with torch.no_grad():
        net(torch.rand(48, N, *shape))  # records the neurons, from the reset state and from a carried state

        def run() -> None:
            for _ in net.stream(torch.rand(8, N, *shape) for _ in range(T // 8)):
                pass

        x_seq = torch.rand(T, N, *shape)
        return {"T": T, "N": N, "bytes": peak_of(lambda: net(x_seq)), "streamed_bytes": peak_of(run)}


def in_process(arguments: Sequence[Any], environment: dict[str, str]) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _inference_line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"inference failed: {row['error']}"
    peak, streamed = row["bytes"] / MiB, row["streamed_bytes"] / MiB
    return f"CSNN inference T={row['T']:<5} N={row['N']:<3} peak {peak:8.1f} MiB, streamed {streamed:8.1f} MiB"


def work(arguments: list[Any]) -> dict[str, Any]:
    what, *rest = arguments
    return {"predict": predict, "train": train, "times": train_in_turns, "inference": inference_over}[what](*rest)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per median (default: 5)")
    parser.add_argument("--bytes", action="store_true", help="measure memory only")
    parser.add_argument("--only", choices=("predict", "train", "inference"), help="run only this part")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        print(json.dumps(work(json.loads(options.worker))))
        return
    results: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine()}
    row: dict[str, Any]
    if options.only in (None, "predict"):
        results["predicted"] = []
        for case in PREDICTED:
            row = {
                **dict(zip(("model", "T", "N", "phase"), case, strict=True)),
                **in_process(["predict", *case], EXACT),
            }
            results["predicted"].append(row)
            if "error" in row:
                print(case, row["error"])
                continue
            error = row["predicted"] / row["measured"] - 1
            print(
                f"{case[0]:14} T={case[1]:<3} N={case[2]:<3} {case[3]:10} predicted {row['predicted'] / MiB:8.1f} MiB "
                f"measured {row['measured'] / MiB:8.1f} MiB {error:+6.1%}  planning took {row['planning_ms']:.0f} ms",
                flush=True,
            )
    if options.only in (None, "inference"):
        results["inference"] = [in_process(["inference", T, N], EXACT) for N in (8, 32) for T in (16, 1024)]
        for row in results["inference"]:
            print(_inference_line(row), flush=True)
    if options.only in (None, "train"):
        results["training"] = []
        for name, (T, N) in SHAPES.items():
            base: dict[str, Any] = {}
            rows: list[dict[str, Any]] = []
            for side in SIDES:
                extra = {"OF_PEER": str(base.get("bytes", 0))}
                row = {"model": name, "T": T, "N": N, "side": side}
                row |= in_process(["train", name, side, T, N], {**EXACT, **extra})
                base = base or row
                rows.append(row)
            sides = [row["side"] for row in rows if "error" not in row]
            for setting, environment in () if options.bytes else TIMED:
                times = in_process(["times", name, sides, T, N, options.repeats], {**environment, **extra})
                for row in rows:
                    row[f"{setting}_ms"] = times.get(row["side"])
            results["training"] += rows
            for row in rows:
                if "error" in row:
                    print(f"{name:14} {row['side']:17} {row['error']}")
                    continue
                measured = [
                    f"{row[key]:8.0f} ms ({row[key] / base[key]:.2f})"
                    for key in ("default_ms", "keeping_ms")
                    if row.get(key) and base.get(key)
                ]
                bytes_of = f"{row['bytes'] / MiB:8.1f} MiB ({row['bytes'] / base['bytes']:.3f})"
                print(f"{name:14} {row['side']:17} {'  '.join([bytes_of, *measured])}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
