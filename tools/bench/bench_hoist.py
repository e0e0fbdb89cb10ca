"""Time a direct-encoded CSNN (same image at every step) with and without hoisting its first layers.

    python tools/bench/bench_hoist.py [--repeats 9]

Both nets have the same model and the same outputs. For one of them, `time_dim=None` declares the input constant in
time, so the layers before the first neuron run once instead of T times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_csnn import single_step_model
from torch import Tensor

import snnfx

T, N = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=9, help="rounds per median (default: 9)")
    repeats = parser.parse_args().repeats
    model, image = single_step_model(), torch.rand(N, 1, 28, 28)
    hoisted, stepped = snnfx.convert(model, time_dim=None), snnfx.convert(model)
    sides: dict[str, Callable[[], Tensor]] = {
        "hoisted": lambda: hoisted(image, T=T),
        "not hoisted": lambda: stepped(image.expand(T, *image.shape)),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 2):
        for name, run in sides.items():
            for mode in ("inference", "training step"):
                hoisted.train(mode != "inference")
                stepped.train(mode != "inference")
                start = time.perf_counter()
                with torch.set_grad_enabled(mode != "inference"):
                    y_seq = run()
                    if mode != "inference":
                        y_seq.sum().backward()
                if repeat >= 2:
                    times.setdefault((name, mode), []).append((time.perf_counter() - start) * 1e3)
    print(f"direct-encoded CSNN, T={T} N={N}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for mode in ("inference", "training step"):
        with_, without = (statistics.median(times[name, mode]) for name in sides)
        print(f"  {mode:<14} hoisted {with_:7.1f} ms   not hoisted {without:7.1f} ms   {without / with_:.2f}x")


if __name__ == "__main__":
    main()
