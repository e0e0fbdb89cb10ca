"""Measure speed and memory for the demonstration: the single-step model against the converted net."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from demo_model import Digits, loss_of, spike_trains, step_through_time
from demo_terminal import Terminal
from torch import Tensor, nn

import snnfx
from snnfx.ir.options import ConvertKeywords

__all__ = ["can_compile", "compare_memory", "compare_speed"]

Runner = Callable[[Tensor], Tensor]


def measure(runners: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each runner. They alternate, so that changes in machine load affect all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(repeats + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training_step(model: nn.Module, run: Runner, x_seq: Tensor, labels: Tensor) -> Callable[[], None]:
    def one_step() -> None:
        model.train()
        model.zero_grad()
        loss_of(run(x_seq), labels).backward()

    return one_step


def inference(model: nn.Module, run: Runner, x_seq: Tensor) -> Callable[[], None]:
    def one_call() -> None:
        model.eval()
        with torch.no_grad():
            run(x_seq)

    return one_call


def can_compile() -> bool:
    """Whether torch.compile can find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name)


def compare_speed(
    model: nn.Module,
    net: snnfx.Net,
    terminal: Terminal,
    digits: Digits,
    sizes: list[tuple[int, int]],
    repeats: int,
    with_compile: bool,
) -> None:
    terminal.section("Time", f"median of {repeats} alternating runs, {machine(digits.train_images.device)}")
    ways: dict[str, Runner] = {"single-step": lambda x_seq: step_through_time(model, x_seq), "converted": net}
    if with_compile:
        ways["torch.compile"] = torch.compile(net, fullgraph=True)
    print("  " + terminal.bold(" " * 26 + "".join(f"{name:>13}{'':8}" for name in ways).rstrip()))
    for label, runners in cases(model, ways, digits, sizes):
        terminal.working(f"{label:<26}{'compiling and ' if with_compile else ''}measuring ...")
        terminal.line(table_row(terminal, label, measure(runners, repeats, digits.train_images.device)))
    snnfx.functional.reset_net(model)
    model.zero_grad()


def cases(
    model: nn.Module, ways: dict[str, Runner], digits: Digits, sizes: list[tuple[int, int]]
) -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    for T, N in sizes:
        x_seq, labels = spike_trains(digits.train_images[:N], T), digits.train_labels[:N]
        steps = {name: training_step(model, run, x_seq, labels) for name, run in ways.items()}
        yield f"training step  T={T} N={N}", steps
        calls = {name: inference(model, run, x_seq) for name, run in ways.items()}
        yield f"inference      T={T} N={N}", calls


def table_row(terminal: Terminal, label: str, seconds: dict[str, float]) -> str:
    """Milliseconds of each way, and the speed-up over the first one."""
    baseline, *_ = seconds.values()
    row = f"{label:<26}"
    for position, value in enumerate(seconds.values()):
        factor = f"{baseline / value:7.1f}x" if position else " " * 8
        row += f"{value * 1000:10.1f} ms" + (terminal.good(factor) if baseline / value >= 1.05 else factor)
    return row.rstrip()


def compare_memory(model: nn.Module, terminal: Terminal, digits: Digits, T: int, N: int, repeats: int) -> None:
    """Train with less memory: recompute in the backward pass the values that do not fit."""
    terminal.section(
        "Memory", f"trading time for memory in a training step (recomputation; same gradients), T={T} N={N}"
    )
    terminal.working("planning and measuring ...")
    x_seq, labels = spike_trains(digits.train_images[:N], T), digits.train_labels[:N]
    example = x_seq[0]
    default_peak = predicted_peak(snnfx.convert(model, example_inputs=example), x_seq)
    budget = 2 * default_peak // 3
    ways: dict[str, ConvertKeywords] = {
        "default": {"example_inputs": example},
        f"memory_budget={budget}": {"example_inputs": example, "memory_budget": budget},
        'checkpoint="regions"': {"example_inputs": example, "checkpoint": "regions"},
    }
    nets = {name: snnfx.convert(model, **options) for name, options in ways.items()}
    seconds = measure(
        {name: training_step(model, net, x_seq, labels) for name, net in nets.items()}, repeats, x_seq.device
    )
    terminal.line(terminal.bold(f"{'option of convert':<26}{'predicted peak':>16}{'time':>13}"))
    for name, net in nets.items():
        ratio = f"  {seconds[name] / seconds['default']:.2f}x the time" if name != "default" else ""
        peak = f"{predicted_peak(net, x_seq) / 2**20:12.1f} MiB"
        terminal.line(f"{name:<26}{peak}{seconds[name] * 1000:10.1f} ms{ratio}")
    model.zero_grad()


def predicted_peak(net: snnfx.Net, x_seq: Tensor) -> int:
    """Peak bytes of a training step, predicted from shapes."""
    net.train()
    memory = snnfx.explain(net, example_inputs=x_seq[0], T=x_seq.shape[0]).memory
    assert memory is not None
    return memory.training.peak


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{threads} thread{'s' * (threads != 1)}, {platform.machine()}"
    return f"{name}, torch {torch.__version__}"
