"""Convert, verify, train, profile and export a spiking network on handwritten digits.

Run it with `bash tools/demo.sh`, which also sets up the environment; `--help` lists the options.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from pathlib import Path

import demo_model
import torch
from demo_measuring import can_compile, compare_memory, compare_speed
from demo_model import DigitNet, Digits, load_data, loss_of, spike_trains, step_through_time, test_spikes
from demo_terminal import Terminal
from torch import Tensor, nn

import snnfx

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.97
REGION_KINDS = {
    "once": ("32", "computed once: its inputs do not change over time"),
    "fold": ("34", "one call for all time steps, with T folded into the batch"),
    "map": ("35", "one call for all time steps, with torch.vmap over T"),
    "loop": ("33", "step by step, because its state depends on the previous step"),
}
"""Colour and explanation by kind."""


def convert_model(model: nn.Module, terminal: Terminal, example: Tensor, report_file: Path) -> snnfx.Net:
    terminal.section("Convert", "net = snnfx.convert(model); snnfx.explain(net)")
    start = time.perf_counter()
    net = snnfx.convert(model, step_mode="m", example_inputs=(example,))
    seconds = time.perf_counter() - start
    report = snnfx.explain(net)
    report_file.write_text(report.to_markdown(), encoding="utf-8")
    terminal.item("time", f"{seconds:.2f} s")
    terminal.item("regions", f"{len(report.regions)}, run one after the other:")
    for region in report.regions:
        contents = ", ".join(map(str, region.contains))
        terminal.item("", terminal.paint(f"{region.name:<8}", REGION_KINDS[region.kind][0]) + contents)
    for kind in dict.fromkeys(region.kind for region in report.regions):
        terminal.item(kind, REGION_KINDS[kind][1])
    return net


def verify_net(model: nn.Module, net: snnfx.Net, terminal: Terminal, x_seq: Tensor) -> None:
    terminal.section("Verify", "snnfx.verify(model, net, x_seq): outputs, states, buffers and gradients, in float64")
    model.train()
    net.train()
    summary, *details = str(snnfx.verify(model, net, x_seq, double=True)).splitlines()
    terminal.item("training mode", terminal.good(summary))
    for line in details:
        terminal.item("", terminal.dim(line.strip()))


def verify_trained(model: nn.Module, net: snnfx.Net, terminal: Terminal, x_seq: Tensor) -> None:
    """Verify evaluation mode with the trained weights: in an untrained net, few neurons spike in this mode."""
    model.eval()
    net.eval()
    report = str(snnfx.verify(model, net, x_seq, double=True)).splitlines()
    terminal.item("verify", terminal.good(next(line for line in report if line.startswith("OK"))))


def profile_net(net: snnfx.Net, terminal: Terminal, x_seq: Tensor, out: Path) -> list[Path]:
    """Measure a training step of the trained net; write the page, and the picture with firing rates."""
    terminal.section("Profile", 'report = snnfx.profile(net, x_seq, train=True); report.save("profile.html")')
    terminal.working("measuring each region ...")
    report = snnfx.profile(net, x_seq, train=True, record=("stem_lif", "readout"), repeats=3)
    slowest = max(report.regions, key=lambda row: row.forward + row.backward)
    share = (slowest.forward + slowest.backward) / sum(row.forward + row.backward for row in report.regions)
    terminal.line(f"{'slowest region':<22}{slowest.region}, {share:.0%} of the time: {', '.join(slowest.contents)}")
    terminal.item("firing rate", f"{report.rate:.1%} of the neurons spike in a step")
    terminal.item("energy estimate", f"{report.energy * 1e6:.0f} µJ, dense {report.dense_energy * 1e6:.0f} µJ")
    for advice in report.advice[:2]:
        terminal.item("would help", f"{advice.option}: {advice.text}")
    page = report.save(out / "profile.html")
    picture = out / ("net.svg" if shutil.which("dot") else "net.dot")
    snnfx.draw(net, picture, profile=report)
    if picture.suffix == ".dot":
        terminal.item("", "for an SVG picture, install graphviz (the program `dot`) and run the demo again")
    return [page, picture]


def export_net(net: snnfx.Net, terminal: Terminal, x_seq: Tensor, out: Path) -> Path:
    """Write the trained net to a file that runs without snnfx."""
    terminal.section("Export", 'snnfx.export(net.eval(), "digits.pt2", x_seq): runs where snnfx is not installed')
    terminal.working("exporting, running the file and comparing ...")
    # torch reports on stderr that it guesses the type of an empty list.
    logging.getLogger("torch._export").setLevel(logging.ERROR)
    start = time.perf_counter()
    path = snnfx.export(net.eval(), out / "digits.pt2", x_seq)
    size = path.stat().st_size / 2**20
    terminal.line(f"{'file':<22}{size:.1f} MiB in {time.perf_counter() - start:.0f} s; equal to the net for other T, N")
    terminal.item("use it", f'torch.export.load("{path.name}").module()(x_seq)')
    return path


def train(net: snnfx.Net, digits: Digits, terminal: Terminal, epochs: int, T: int, batch: int = 64) -> float:
    """Train with surrogate gradients and BPTT; return the test accuracy."""
    length = f"{epochs} epoch{'s' * (epochs > 1)} on {len(digits.train_labels)} digits as spike trains of {T} steps"
    terminal.section("Train", f"a PyTorch training loop with surrogate gradients: {length}")
    steps = len(digits.train_labels) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * steps)
    start, test_accuracy, loss = time.perf_counter(), 0.0, torch.tensor(0.0)
    for epoch in range(1, epochs + 1):
        net.train()
        order = torch.randperm(len(digits.train_labels), device=digits.train_labels.device)
        for step in range(1, steps + 1):
            index = order[(step - 1) * batch : step * batch]
            loss = loss_of(net(spike_trains(digits.train_images[index], T)), digits.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            last = step == steps
            if last:
                test_accuracy = accuracy(net, digits, T)
            text = f"epoch {epoch:2}/{epochs}  loss {loss.item():.3f}  test accuracy {test_accuracy:6.1%}"
            done = ((epoch - 1) * steps + step) / (epochs * steps)
            text += f"  {time.perf_counter() - start:4.0f} s"
            terminal.progress(done, text, milestone=last and (epoch % 5 == 0 or epoch == epochs))
    return test_accuracy


@torch.no_grad()
def accuracy(net: snnfx.Net, digits: Digits, T: int) -> float:
    net.eval()
    predicted = net(test_spikes(digits, T)).mean(0).argmax(1)
    return (predicted == digits.test_labels).float().mean().item()


@torch.no_grad()
def count_same_predictions(model: nn.Module, net: snnfx.Net, digits: Digits, T: int) -> int:
    """The number of test digits for which the single-step model, with the trained weights, predicts the same."""
    model.eval()
    net.eval()
    x_seq = test_spikes(digits, T)
    by_step = step_through_time(model, x_seq).mean(0).argmax(1)
    snnfx.functional.reset_net(model)
    return int((by_step == net(x_seq).mean(0).argmax(1)).sum())


def grade(terminal: Terminal, reached: float, quick: bool) -> str:
    if quick:
        return f"{reached:.1%}  {terminal.dim(f'(short training; target without --quick: {TARGET:.0%})')}"
    return terminal.good(f"{reached:.1%}") if reached >= TARGET else terminal.bad(f"{reached:.1%}, below {TARGET:.0%}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/demo.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo_output", help="output folder (default: demo_output)")
    parser.add_argument("--epochs", type=int, default=8, help="training epochs (default: 8)")
    parser.add_argument("--T", type=int, default=8, help="time steps (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--full", action="store_true", help="also compare with torch.compile, and show memory options")
    parser.add_argument("--quick", action="store_true", help="smoke test: small model, 3 epochs")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.T < 1 or options.epochs < 1:
        print("error: --T and --epochs must be at least 1", file=sys.stderr)
        return 2
    started = time.perf_counter()
    terminal = Terminal()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    epochs = 3 if options.quick else options.epochs

    digits = load_data(device)
    terminal.section("Data", "scikit-learn's handwritten digits as spike trains: a pixel spikes with its brightness")
    count = f"{len(digits.train_labels)} for training and {len(digits.test_labels)} for testing"
    terminal.item("images", f"8 x 8 pixels: {count}")
    terminal.item("spike trains", f"{options.T} time steps, [T, N, 1, 8, 8]")
    model = DigitNet(channels=8 if options.quick else 32).to(device)
    terminal.section("Model", "a spiking ResNet, written for one time step")
    terminal.item("source", f"{Path(demo_model.__file__).resolve().relative_to(ROOT)}, class DigitNet")
    terminal.item("parameters", f"{sum(p.numel() for p in model.parameters()):,}")

    example = spike_trains(digits.train_images[:2], 1)[0]
    report_file = out / "report.md"
    net = convert_model(model, terminal, example, report_file)
    verify_net(model, net, terminal, spike_trains(digits.train_images[:4], options.T))
    reached = train(net, digits, terminal, epochs, options.T)
    weights = out / "digits.pt"
    torch.save(model.state_dict(), weights)
    same, total = count_same_predictions(model, net, digits, options.T), len(digits.test_labels)
    terminal.item("test accuracy", grade(terminal, reached, options.quick))
    verify_trained(model, net, terminal, spike_trains(digits.test_images[:4], options.T))
    terminal.item("predictions", f"the single-step model and the net agree on {same} of {total} test digits")
    compare(model, net, terminal, digits, options)
    files = profile_net(net, terminal, spike_trains(digits.test_images[:32], options.T), out)
    files.append(export_net(net, terminal, spike_trains(digits.test_images[:4], options.T), out))

    terminal.section("Open these three files", f"{time.perf_counter() - started:.0f} s in total")
    explanations = {
        "profile page": "time, spikes, memory",
        "picture": "firing rates",
        "exported net": "runs without snnfx",
    }
    for path, (name, explanation) in zip(files, explanations.items(), strict=True):
        terminal.item(name, f"{path}  {terminal.dim(f'({explanation})')}")
    terminal.item("also written", f"{report_file.name} (regions and why), {weights.name} (weights of model and net)")
    return 0 if reached >= TARGET or options.quick else 1


def compare(model: nn.Module, net: snnfx.Net, terminal: Terminal, digits: Digits, options: argparse.Namespace) -> None:
    """Time the net against the single-step model; with --full also against torch.compile and for memory options."""
    with_compile = options.full and not options.quick
    if with_compile and not can_compile():
        with_compile = False
        terminal.item("torch.compile", "skipped, because it needs a C++ compiler (g++ or clang++)")
    sizes = [(options.T, 64), (4 * options.T, 1)] if options.full else [(options.T, 16 if options.quick else 64)]
    repeats = 15 if options.full else 3
    compare_speed(model, net, terminal, digits, sizes, repeats=repeats, with_compile=with_compile)
    if options.full:
        compare_memory(model, terminal, digits, *sizes[0], repeats=repeats)


if __name__ == "__main__":
    sys.exit(main())
