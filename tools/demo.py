"""From a single-step spiking network to a multi-step one, on handwritten digits: convert, verify, draw, train, time.

Run it with `bash tools/demo.sh`, which also sets up what it needs; `--help` lists the options.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import snnfx
from snnfx import neuron, surrogate
from snnfx.ir.options import ConvertKeywords

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.97
KIND_COLOURS = {"once": "32", "fold": "34", "map": "35", "loop": "33"}


# The model: one time step, written as if there were no time.


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut around them; the sum goes into the second neuron."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.lif1 = lif()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.lif2 = lif()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.lif2(y + x)


class DigitNet(nn.Module):
    """What happens in ONE time step: spikes `[N, 1, 8, 8]` in, potentials of ten read-out neurons `[N, 10]` out."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        self.stem_lif = lif()
        self.block = ResidualBlock(channels)
        self.down = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(2 * channels)
        self.down_lif = lif()
        self.head = nn.Linear(2 * channels * 2 * 2, 10)
        self.readout = neuron.LeakyIntegrator(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_lif(self.stem_bn(self.stem(x)))
        x = F.max_pool2d(self.block(x), 2)
        x = F.max_pool2d(self.down_lif(self.down_bn(self.down(x))), 2)
        return self.readout(self.head(x.flatten(1)))


def lif() -> nn.Module:
    return neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())


def step_through_time(model: nn.Module, x_seq: Tensor) -> Tensor:
    """The ordinary way to run a single-step model: reset it, then call it once per time step."""
    snnfx.functional.reset_net(model)
    return torch.stack([model(x) for x in x_seq])


# The data: scikit-learn's handwritten digits, 8 x 8 pixels, as trains of spikes.


@dataclass(frozen=True)
class Digits:
    """Images `[n, 1, 8, 8]` in [0, 1] and their labels `[n]`, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(device: torch.device) -> Digits:
    bunch = load_digits()
    split = train_test_split(bunch.images / 16.0, bunch.target, test_size=360, stratify=bunch.target, random_state=0)
    train_x, test_x, train_y, test_y = (torch.as_tensor(array, device=device) for array in split)
    return Digits(train_x.float().unsqueeze(1), train_y.long(), test_x.float().unsqueeze(1), test_y.long())


def spike_trains(images: Tensor, T: int, generator: torch.Generator | None = None) -> Tensor:
    """Rate coding: in each step a pixel spikes with its brightness as probability. `[N, ...]` -> `[T, N, ...]`."""
    return torch.bernoulli(images.expand(T, *images.shape), generator=generator)


def test_spikes(digits: Digits, T: int) -> Tensor:
    """The same spike trains for every evaluation, so that accuracies can be compared."""
    generator = torch.Generator(digits.test_images.device).manual_seed(1234)
    return spike_trains(digits.test_images, T, generator)


# The terminal.


class Terminal:
    """Colours and the progress bar; plain lines where there is no terminal, or where NO_COLOR is set."""

    def __init__(self) -> None:
        self.interactive = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colours = self.interactive and "NO_COLOR" not in os.environ
        encoding = (sys.stdout.encoding or "ascii").lower()
        self.bar_glyphs = ("█", "░") if encoding.startswith("utf") else ("#", ".")

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text

    def bold(self, text: str) -> str:
        return self.paint(text, "1")

    def dim(self, text: str) -> str:
        return self.paint(text, "2")

    def good(self, text: str) -> str:
        return self.paint(text, "32")

    def bad(self, text: str) -> str:
        return self.paint(text, "31")

    def section(self, title: str, explanation: str) -> None:
        print(f"\n{self.paint(title, '1;36')}  {self.dim(explanation)}", flush=True)

    def item(self, name: str, value: str) -> None:
        print(f"  {name:<22}{value}", flush=True)

    def indented(self, text: str) -> None:
        print("\n".join("  " + line if line else "" for line in text.splitlines()), flush=True)

    def working(self, text: str) -> None:
        """What is going on, on a line that the next output overwrites; nothing without a terminal."""
        if self.interactive:
            print(f"  {self.dim(text)}\x1b[K", end="\r", flush=True)

    def progress(self, fraction: float, text: str, *, milestone: bool) -> None:
        """Redraw the bar in place; without a terminal, print a line at the milestones only."""
        if self.interactive:
            width = max(10, min(32, shutil.get_terminal_size().columns - 60))
            full = round(fraction * width)
            bar = self.paint(self.bar_glyphs[0] * full, "32") + self.dim(self.bar_glyphs[1] * (width - full))
            print(f"\r  {bar} {fraction:4.0%}  {text}\x1b[K", end="\n" if fraction >= 1 else "", flush=True)
        elif milestone:
            print(f"  {fraction:4.0%}  {text}", flush=True)


# The steps of the demonstration.


def convert_model(model: nn.Module, terminal: Terminal, example: Tensor, report_file: Path) -> snnfx.Net:
    terminal.section("Convert", "net = snnfx.convert(model); snnfx.explain(net)")
    start = time.perf_counter()
    net = snnfx.convert(model, step_mode="m", example_inputs=(example,))
    seconds = time.perf_counter() - start
    report = snnfx.explain(net)
    report_file.write_text(report.to_markdown(), encoding="utf-8")
    terminal.item("time", f"{seconds:.2f} s")
    terminal.item("regions", count_kinds(net))
    for region in report.regions:
        contents = ", ".join(map(str, region.contains))
        terminal.item("", terminal.paint(f"{region.name:<8}", KIND_COLOURS[region.kind]) + contents)
    terminal.item("fold", "T is folded into the batch: one call for all time steps")
    terminal.item("loop", "one time step after the other: it depends on the step before")
    return net


def count_kinds(net: snnfx.Net) -> str:
    kinds = [region.kind for region in net.regions]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def verify_net(model: nn.Module, net: snnfx.Net, terminal: Terminal, x_seq: Tensor) -> None:
    terminal.section("Verify", "outputs, states and gradients against the stepped model, in float64")
    for training in (False, True):
        model.train(training)
        net.train(training)
        report = snnfx.verify(model, net, x_seq, double=True)
        summary, *details = str(report).splitlines()
        terminal.item("train mode" if training else "eval mode", terminal.good(summary))
        for line in details:
            terminal.item("", terminal.dim(line.strip()))


def draw_before_and_after(
    model: nn.Module, net: snnfx.Net, terminal: Terminal, out: Path, example: Tensor
) -> list[Path]:
    terminal.section("Draw", "snnfx.draw(model, ...), snnfx.draw(net, ...)")
    suffix = ".svg" if shutil.which("dot") else ".dot"
    before, after = out / f"single_step{suffix}", out / f"multi_step{suffix}"
    snnfx.draw(model, before, example_inputs=(example,))
    snnfx.draw(net, after)
    terminal.item("one time step", str(before))
    terminal.item("the whole sequence", str(after))
    if suffix == ".dot":
        terminal.item("", "install graphviz (the program `dot`) and run again for SVG pictures")
    return [before, after]


def train(net: snnfx.Net, digits: Digits, terminal: Terminal, epochs: int, T: int, batch: int = 64) -> float:
    """Train with surrogate gradients through time; returns the accuracy on the test set."""
    terminal.section(
        "Train", f"{epochs} epoch{'s' * (epochs > 1)} on {len(digits.train_labels)} digits as spike trains of {T} steps"
    )
    steps = len(digits.train_labels) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * steps)
    start, test_accuracy, loss = time.perf_counter(), 0.0, torch.tensor(0.0)
    for epoch in range(1, epochs + 1):
        net.train()
        order = torch.randperm(len(digits.train_labels), device=digits.train_labels.device)
        for step in range(1, steps + 1):
            picked = order[(step - 1) * batch : step * batch]
            loss = loss_of(net(spike_trains(digits.train_images[picked], T)), digits.train_labels[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            last = step == steps
            if last:
                test_accuracy = accuracy(net, digits, T)
            text = f"epoch {epoch:2}/{epochs}  loss {loss.item():.3f}  test {test_accuracy:6.1%}"
            done = ((epoch - 1) * steps + step) / (epochs * steps)
            text += f"  {time.perf_counter() - start:4.0f} s"
            terminal.progress(done, text, milestone=last and (epoch % 5 == 0 or epoch == epochs))
    return test_accuracy


def loss_of(potentials: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the read-out potentials `[T, N, 10]`, averaged over time."""
    return F.cross_entropy(potentials.mean(0), labels, label_smoothing=0.05)


@torch.no_grad()
def accuracy(net: snnfx.Net, digits: Digits, T: int) -> float:
    net.eval()
    predicted = net(test_spikes(digits, T)).mean(0).argmax(1)
    return (predicted == digits.test_labels).float().mean().item()


@torch.no_grad()
def count_same_predictions(model: nn.Module, net: snnfx.Net, digits: Digits, T: int) -> int:
    """On how many test digits the single-step model, which shares the trained layers, says the same as the net."""
    model.eval()
    net.eval()
    x_seq = test_spikes(digits, T)
    by_step = step_through_time(model, x_seq).mean(0).argmax(1)
    snnfx.functional.reset_net(model)
    return int((by_step == net(x_seq).mean(0).argmax(1)).sum())


# Measuring.


Runner = Callable[[Tensor], Tensor]


def measure(runners: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each runner; they take turns, so that a change of the machine's pace meets all of them."""
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
    terminal.section("Time", f"medians of {repeats} alternating runs, {machine(digits.train_images.device)}")
    ways: dict[str, Runner] = {"single-step": lambda x_seq: step_through_time(model, x_seq), "converted": net}
    if with_compile:
        ways["compiled"] = torch.compile(net, fullgraph=True)
    print("  " + terminal.bold(" " * 26 + "".join(f"{name:>13}{'':8}" for name in ways).rstrip()))
    for label, runners in cases(model, ways, digits, sizes):
        terminal.working(f"{label:<26}{'compiling and ' if with_compile else ''}measuring ...")
        row = table_row(terminal, label, measure(runners, repeats, digits.train_images.device))
        print(row + ("\x1b[K" if terminal.interactive else ""), flush=True)
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


def compare_memory(model: nn.Module, terminal: Terminal, digits: Digits, T: int, N: int, repeats: int) -> None:
    """Training steps that may hold less, with what does not fit computed again in the backward pass."""
    x_seq, labels = spike_trains(digits.train_images[:N], T), digits.train_labels[:N]
    whole = predicted_peak(snnfx.convert(model, example_inputs=x_seq[0]), x_seq)
    example = x_seq[0]
    ways: dict[str, ConvertKeywords] = {
        "all kept": {"example_inputs": example},
        "two thirds of it": {"example_inputs": example, "memory_budget": 2 * whole // 3},
        "the least": {"example_inputs": example, "checkpoint": "regions"},
    }
    nets = {name: snnfx.convert(model, **options) for name, options in ways.items()}
    seconds = measure(
        {name: training_step(model, net, x_seq, labels) for name, net in nets.items()}, repeats, x_seq.device
    )
    terminal.section(
        "Memory", "training steps that keep less (memory_budget=, checkpoint=), predicted bytes; the same gradients"
    )
    for name, net in nets.items():
        peak = f"{predicted_peak(net, x_seq) / 2**20:10.1f} MiB"
        slower = f"{seconds[name] / seconds['all kept']:7.2f} of the time" if name != "all kept" else ""
        print(f"  {f'T={T} N={N}, {name}':<26}{peak}{seconds[name] * 1000:10.1f} ms{slower}")
    model.zero_grad()


def predicted_peak(net: snnfx.Net, x_seq: Tensor) -> int:
    """Bytes at the widest point of a training step, told from shapes."""
    net.train()
    memory = snnfx.explain(net, example_inputs=x_seq[0], T=x_seq.shape[0]).memory
    assert memory is not None
    return memory.training.peak


def table_row(terminal: Terminal, label: str, seconds: dict[str, float]) -> str:
    """Milliseconds of each way, and how many times faster than the first it is."""
    baseline, *_ = seconds.values()
    row = f"  {label:<26}"
    for position, value in enumerate(seconds.values()):
        factor = f"{baseline / value:7.1f}x" if position else " " * 8
        row += f"{value * 1000:10.1f} ms" + (terminal.good(factor) if baseline / value >= 1.05 else factor)
    return row.rstrip()


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"{torch.get_num_threads()} threads, {platform.machine()}"
    return f"{place}, torch {torch.__version__}"


def grade(terminal: Terminal, reached: float, quick: bool) -> str:
    if quick:
        return f"{reached:.1%}  {terminal.dim('(after a short training)')}"
    return terminal.good(f"{reached:.1%}") if reached >= TARGET else terminal.bad(f"{reached:.1%}, below {TARGET:.0%}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/demo.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo_output", help="where the pictures go")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--T", type=int, default=8, help="time steps (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the comparison")
    parser.add_argument(
        "--quick", action="store_true", help="does it run? a small model, three epochs, no torch.compile"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.T < 1 or options.epochs < 1:
        print("--T and --epochs are at least 1", file=sys.stderr)
        return 2
    started = time.perf_counter()
    terminal = Terminal()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    epochs = 3 if options.quick else options.epochs

    digits = load_data(device)
    model = DigitNet(channels=8 if options.quick else 32).to(device)
    terminal.section("Model", "a spiking network for one time step: convolutions, BatchNorm, a residual block")
    terminal.item("file", f"{Path(__file__).relative_to(ROOT)}, class DigitNet")
    terminal.item("parameters", f"{sum(p.numel() for p in model.parameters()):,}")
    terminal.item("data", f"{len(digits.train_labels)} + {len(digits.test_labels)} handwritten digits, 8 x 8 pixels")

    example = spike_trains(digits.train_images[:2], 1)[0]
    report_file = options.out / "report.md"
    net = convert_model(model, terminal, example, report_file)
    verify_net(model, net, terminal, spike_trains(digits.train_images[:4], options.T))
    pictures = draw_before_and_after(model, net, terminal, options.out, example)
    reached = train(net, digits, terminal, epochs, options.T)
    weights = options.out / "digits.pt"
    torch.save(model.state_dict(), weights)
    same, total = count_same_predictions(model, net, digits, options.T), len(digits.test_labels)
    terminal.item("test accuracy", grade(terminal, reached, options.quick))
    terminal.item("same prediction", f"single-step model and net agree on {same} of {total} test digits")

    with_compile = not options.quick and not options.no_compile
    if with_compile and not can_compile():
        with_compile = False
        terminal.item("torch.compile", "left out: it needs a C++ compiler (g++ or clang++)")
    sizes = [(options.T, 16)] if options.quick else [(options.T, 64), (4 * options.T, 1)]
    compare_speed(model, net, terminal, digits, sizes, repeats=3 if options.quick else 15, with_compile=with_compile)

    compare_memory(model, terminal, digits, *sizes[0], repeats=3 if options.quick else 15)

    terminal.section("Where everything is", f"{time.perf_counter() - started:.0f} s in all")
    for name, path in zip(["before", "after"], pictures, strict=True):
        terminal.item(f"picture {name}", str(path))
    terminal.item("what was converted", f"{report_file}  {terminal.dim('(regions, reasons, states, chunks)')}")
    terminal.item("trained weights", f"{weights}  {terminal.dim('(for the model and for the net)')}")
    terminal.item("this demonstration", str(Path(__file__)))
    return 0 if reached >= TARGET or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
