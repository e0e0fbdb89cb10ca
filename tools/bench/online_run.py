"""Train a spiking net with five learning rules: accuracy, time and peak memory by sequence length.

    python tools/bench/online_run.py [--epochs 4] [--T 8 32 128] [--json FILE] [--svg FILE]

Needs scikit-learn and matplotlib: `pip install ".[bench]"`. Three to five minutes on two cores.

The data are scikit-learn's digits (8x8 pixels), rate-coded: at each step, a pixel spikes with its brightness as
probability. The net has two convolutions with spiking neurons and a leaky readout; the loss is the cross entropy of
the readout potential at every step. All rules start from the same weights and see the same spikes in the same order;
rules that update at every step use a smaller learning rate. Each run has its own process with one thread, and two run
at a time. The time is the CPU time of training, the memory is the growth of the process while it trains. The accuracy
is measured with the mean potential on 360 held-out digits.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from process_memory import peak_of
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.online import BPTT, FPTT, OTTT_A, OTTT_O, SLTT_K, Rule, Trainer

TOOLS = Path(__file__).resolve().parents[1]
BATCH = 64
CHUNK = 16
LABELS = ("BPTT", "OTTT-A", "OTTT-O", "SLTT-K", "FPTT")
COLOURS = {"BPTT": "#555555", "OTTT-A": "#1f77b4", "OTTT-O": "#17a2b8", "SLTT-K": "#2ca02c", "FPTT": "#d6621e"}
MARKERS = {"BPTT": "s", "OTTT-A": "o", "OTTT-O": "v", "SLTT-K": "D", "FPTT": "^"}


def choose_rule(label: str, T: int) -> tuple[Rule, float]:
    """The rule of a label and its learning rate, which is smaller for rules that make T updates per sequence."""
    rules: dict[str, tuple[Rule, float]] = {
        "BPTT": (BPTT, 1e-2),
        "OTTT-A": (OTTT_A, 1e-2),
        "OTTT-O": (OTTT_O, 1e-2 / math.sqrt(T)),
        "SLTT-K": (SLTT_K(max(1, T // 4)), 1e-2),
        "FPTT": (FPTT(0.5, "authors", keep_multipliers=False), 1e-2 / math.sqrt(T)),
    }
    return rules[label]


def build_model() -> nn.Module:
    """ONE time step: spikes `[N, 1, 8, 8]` in, potentials of ten readout neurons out."""

    def lif() -> nn.Module:
        return snnfx.neuron.LIFNode(tau=2.0, v_threshold=0.3, decay_input=False, v_reset=None, detach_reset=True)

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), lif(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), lif(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 10), snnfx.neuron.LeakyIntegrator(tau=8.0, decay_input=False),
    )  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` between 0 and 1, and their labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data() -> Digits:
    bunch = load_digits()
    split = train_test_split(bunch.images / 16.0, bunch.target, test_size=360, stratify=bunch.target, random_state=0)
    train_x, test_x, train_y, test_y = (torch.as_tensor(array) for array in split)
    return Digits(train_x.float().unsqueeze(1), train_y.long(), test_x.float().unsqueeze(1), test_y.long())


def spike_trains(images: Tensor, T: int, generator: torch.Generator) -> Tensor:
    """Rate coding, `[N, ...]` -> `[T, N, ...]`."""
    return torch.bernoulli(images.expand(T, *images.shape), generator=generator)


def accuracy(net: snnfx.Net, digits: Digits, T: int) -> float:
    generator = torch.Generator().manual_seed(1)
    net.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(digits.test_images.split(60), digits.test_labels.split(60), strict=True):
            potentials = net(spike_trains(images, T, generator)).mean(0)
            right += int((potentials.argmax(1) == labels).sum())
    net.train()
    return right / len(digits.test_labels)


@dataclass(frozen=True)
class Outcome:
    """Results of one run: CPU seconds per epoch, and peak memory in MiB."""

    rule: str
    T: int
    accuracy: float
    seconds_per_epoch: float
    peak_mib: float
    updates: int


def train(label: str, T: int, epochs: int) -> Outcome:
    """Train from scratch; call it in a fresh process."""
    torch.set_num_threads(1)
    digits = load_data()
    rule, rate = choose_rule(label, T)
    net = snnfx.convert(build_model(), example_inputs=digits.train_images[:BATCH])
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    chunk = None if label == "BPTT" else CHUNK
    trainer = Trainer(net, rule, optimizer, F.cross_entropy, target_dim=None, chunk=chunk)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    seconds, updates = 0.0, 0

    def run_epochs() -> None:
        nonlocal seconds, updates
        for _ in range(epochs):
            order = torch.randperm(len(digits.train_labels), generator=generator)
            for index in order.split(BATCH):
                x_seq = spike_trains(digits.train_images[index], T, generator)
                start = time.process_time()
                updates += trainer.step(x_seq, digits.train_labels[index]).updates
                seconds += time.process_time() - start

    peak = peak_of(run_epochs) / 2**20
    return Outcome(label, T, accuracy(net, digits, T), seconds / epochs, peak, updates)


def print_table(rows: list[Outcome], lengths: list[int]) -> None:
    """Print accuracy, seconds per epoch and peak memory, one row per rule."""
    print("\n" + " " * 8 + "".join(f"{f'T={T}':^30}" for T in lengths))
    print(f"{'rule':<8}" + f"{'accuracy':>10}{'s/epoch':>10}{'MiB':>8}  " * len(lengths))
    for label in dict.fromkeys(row.rule for row in rows):
        cells = {row.T: row for row in rows if row.rule == label}
        shown = (
            f"{cells[T].accuracy:>10.1%}{cells[T].seconds_per_epoch:>10.2f}{cells[T].peak_mib:>8.0f}  " for T in lengths
        )
        print(f"{label:<8}" + "".join(shown))


def plot(rows: list[Outcome], lengths: list[int], file: Path) -> None:
    """Plot accuracy, seconds per epoch and peak memory over T."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    style: dict[Any, Any] = {
        "svg.hashsalt": "snnfx",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "xtick.color": "#333333",
        "ytick.color": "#333333",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#e4e4e4",
    }
    panels: tuple[tuple[str, str, str], ...] = (
        ("accuracy", "Accuracy on held-out digits (%)", "linear"),
        ("seconds_per_epoch", "Training time (s per epoch, one thread)", "log"),
        ("peak_mib", "Peak memory above start (MiB)", "log"),
    )
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
        for axis, (name, title, scale) in zip(axes, panels, strict=True):
            for label in dict.fromkeys(row.rule for row in rows):
                cells = sorted((row.T, getattr(row, name)) for row in rows if row.rule == label)
                factor = 100 if name == "accuracy" else 1
                axis.plot(
                    [T for T, _ in cells], [factor * value for _, value in cells],
                    label=label, color=COLOURS[label], marker=MARKERS[label], markersize=6, linewidth=1.6,
                    linestyle="--" if label == "BPTT" else "-", markeredgecolor="white", markeredgewidth=0.6,
                )  # fmt: skip
            axis.set_title(title, fontsize=10.5, loc="left", color="#222222")
            axis.set_xscale("log", base=2)
            axis.set_yscale(scale)
            axis.set_xticks(lengths, [str(T) for T in lengths])
            axis.set_xlabel("time steps T")
            if scale == "log":
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.yaxis.set_minor_formatter(NullFormatter())
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.patch.set_facecolor("white")
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--epochs", type=int, default=4, help="training epochs (default: 4)")
    parser.add_argument("--T", type=int, nargs="+", default=[8, 32, 128], help="sequence lengths")
    parser.add_argument("--rules", nargs="+", choices=LABELS, default=list(LABELS), help="default: all")
    parser.add_argument(
        "--json", type=Path, default=TOOLS / "results" / "online_digits.json", help="file for the results"
    )
    parser.add_argument("--svg", type=Path, default=TOOLS / "pictures" / "online_digits.svg", help="file for the chart")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("this benchmark needs Linux, because it reads the peak memory from /proc")
    started = time.perf_counter()
    rows: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context, max_tasks_per_child=1) as pool:
        cases = [(label, T) for T in arguments.T for label in arguments.rules]
        for future in [pool.submit(train, label, T, arguments.epochs) for label, T in cases]:
            row = future.result()
            rows.append(row)
            print(
                f"{row.rule:<8} T={row.T:<4} {row.accuracy:6.1%}  {row.seconds_per_epoch:6.2f} s/epoch"
                f"  {row.peak_mib:6.0f} MiB  {row.updates} updates",
                flush=True,
            )
    print_table(rows, arguments.T)
    machine = {"torch": torch.__version__, "threads": 1, "machine": platform.machine()}
    settings = {"epochs": arguments.epochs, "batch": BATCH, "chunk": CHUNK, "optimizer": "Adam"}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "settings": settings, "runs": [asdict(row) for row in rows]}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    plot(rows, arguments.T, arguments.svg)
    print(f"\n{time.perf_counter() - started:.0f} s\n{arguments.json}\n{arguments.svg}")


if __name__ == "__main__":
    main()
