"""Convert models of other libraries and verify the nets: `python tools/bench/third_party.py`.

Prints a table with, for each model, the number of nodes, the regions by kind, whether `snnfx.verify` passes in training
and evaluation mode (outputs, final state, gradients and buffers, in float64; in float32 for snnTorch, whose spikes are
always float32), and the conversion time in seconds. Libraries that are not installed are skipped with a message.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

import snnfx
from snnfx.errors import SnnfxError


@dataclass
class Entry:
    """A model of a library, and the shape of one step of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    scale: float = 1.0


@dataclass
class Row:
    """One row of the table."""

    name: str
    nodes: int
    regions: Counter[str]
    verified: str
    seconds: float


def define_missing_operators() -> bool:
    """Make torchvision importable on a torch build without its operators; return False if it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    for _ in range(20):
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            name = str(error).partition("operator ")[2].split()[0]
            torch.library.define(name, "(Tensor a, Tensor b, float c) -> Tensor")
        else:
            return True
    return False


def spikingjelly_models() -> Iterator[Entry]:
    with_torchvision = define_missing_operators()  # before the models, which import torchvision if it is installed
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import parametric_lif_net, spiking_vgg

    def built(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
        model = make(**options)
        functional.set_step_mode(model, "s")
        return model

    spiking: dict[str, Any] = {"spiking_neuron": neuron.IFNode, "surrogate_function": surrogate.ATan()}
    image = (2, 3, 32, 32)
    if with_torchvision:
        from spikingjelly.activation_based.model import sew_resnet, spiking_resnet

        for depth in (18, 101):
            make = getattr(sew_resnet, f"sew_resnet{depth}")
            yield Entry(f"sew_resnet{depth}", functools.partial(built, make, cnf="ADD", **spiking), image)
        for depth in (34,):
            make = getattr(spiking_resnet, f"spiking_resnet{depth}")
            yield Entry(f"spiking_resnet{depth}", functools.partial(built, make, **spiking), image)
    else:
        print("skipped spiking_resnet and sew_resnet: torchvision is not installed", file=sys.stderr)
    for name in ("spiking_vgg11_bn", "spiking_vgg19"):
        make = getattr(spiking_vgg, name)
        yield Entry(name, functools.partial(built, make, **spiking), image)
    leaky: dict[str, Any] = {"channels": 8, "spiking_neuron": neuron.ParametricLIFNode}
    for name, shape in (
        ("MNISTNet", (2, 1, 28, 28)),
        ("CIFAR10Net", (2, 3, 32, 32)),
        ("CIFAR10DVSNet", (2, 2, 128, 128)),
        ("DVSGestureNet", (2, 2, 128, 128)),
    ):
        make = getattr(parametric_lif_net, name)
        yield Entry(f"parametric_lif_net.{name}", functools.partial(built, make, **leaky), shape)


def snntorch_models() -> Iterator[Entry]:
    import snntorch

    class Explicit(nn.Module):
        """Two layers with explicit membrane potentials, as in the tutorials of snnTorch."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(784, 1000), snntorch.Leaky(beta=0.95)
            self.fc2, self.lif2 = nn.Linear(1000, 10), snntorch.Leaky(beta=0.95)

        def forward(self, x: Any, mem1: Any = None, mem2: Any = None) -> Any:
            spikes, mem1 = self.lif1(self.fc1(x), mem1)
            spikes, mem2 = self.lif2(self.fc2(spikes), mem2)
            return spikes, mem1, mem2

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(784, 128), nn.Linear(128, 10)
            self.lif1 = snntorch.RLeaky(beta=0.9, linear_features=128, init_hidden=True)
            self.lif2 = snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True)

        def forward(self, x: Any) -> Any:
            return self.lif2(self.fc2(self.lif1(self.fc1(x))))

    def convolutional() -> nn.Module:
        def leaky() -> nn.Module:
            return snntorch.Leaky(beta=0.5, init_hidden=True)

        return nn.Sequential(
            *(nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), leaky()),
            *(nn.Conv2d(12, 64, 5), nn.MaxPool2d(2), leaky()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10), leaky()),
        )

    yield Entry("fully connected, (spk, mem)", Explicit, (2, 784))
    yield Entry("convolutional, init_hidden", convolutional, (2, 1, 28, 28))
    yield Entry("RLeaky and Synaptic", Recurrent, (2, 784))


def norse_models() -> Iterator[Entry]:
    import norse.torch as norse

    def convolutional() -> nn.Module:
        return norse.SequentialState(
            *(nn.Conv2d(1, 20, 5), norse.LIFCell(), nn.MaxPool2d(2)),
            *(nn.Conv2d(20, 50, 5), norse.LIFCell(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(800, 500), norse.LIFCell(), norse.LILinearCell(500, 10)),
        )

    def adaptive() -> nn.Module:
        return norse.SequentialState(norse.LSNNRecurrentCell(40, 100), norse.LILinearCell(100, 10))

    def recurrent() -> nn.Module:
        return norse.SequentialState(norse.LIFRecurrentCell(40, 100), norse.LIFRecurrentCell(100, 50), nn.Linear(50, 5))

    yield Entry("ConvNet, SequentialState", convolutional, (2, 1, 28, 28), 20.0)
    yield Entry("LSNN with a leaky readout", adaptive, (2, 40), 20.0)
    yield Entry("two LIFRecurrentCell", recurrent, (2, 40), 20.0)


LIBRARIES: dict[str, Callable[[], Iterator[Entry]]] = {
    "snntorch": snntorch_models,
    "norse": norse_models,
    "spikingjelly": spikingjelly_models,
}


def convert(entry: Entry, steps: int, double: bool) -> Row:
    """Convert a model, count its regions, and verify it in both modes."""
    torch.manual_seed(0)
    model = entry.make()
    example = torch.rand(entry.shape) * entry.scale
    start = time.perf_counter()
    net = snnfx.convert(model, example_inputs=(example,))
    seconds = time.perf_counter() - start
    report = snnfx.explain(net)
    x_seq = torch.rand(steps, *entry.shape) * entry.scale
    verified = "yes"
    try:
        for training in (True, False):
            snnfx.verify(model, net.train(training), x_seq, double=double)
    except SnnfxError as error:
        verified = f"no: {error.code}"
    return Row(entry.name, report.counts["nodes"], Counter(r.kind for r in report.regions), verified, seconds)


def line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="time steps to verify (default: 3)")
    parser.add_argument(
        "--library", choices=LIBRARIES, action="append", help="a library to convert; repeatable (default: all)"
    )
    parser.add_argument("--only", default="", help="convert only models whose name contains this text")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = ("fold", "loop", "map", "once")
    print(line(["library", "model", "nodes", *kinds, "verified", "seconds"]))
    print(line(["---"] * 5 + ["---"] * 4))
    rows: list[Row] = []
    for library in arguments.library or LIBRARIES:
        if importlib.util.find_spec(library) is None:
            print(f"skipped {library}: it is not installed", file=sys.stderr)
            continue
        for entry in LIBRARIES[library]():
            if arguments.only in entry.name:
                row = convert(entry, arguments.steps, double=library != "snntorch")
                rows.append(row)
                counts = [row.regions[kind] for kind in kinds]
                print(line([library, row.name, row.nodes, *counts, row.verified, f"{row.seconds:.2f}"]), flush=True)
    if rows:
        largest = max(rows, key=lambda row: row.nodes)
        slowest = max(rows, key=lambda row: row.seconds)
        agree = sum(row.verified == "yes" for row in rows)
        print(f"\n{agree} of {len(rows)} verified.")
        print(f"Largest model: {largest.name}, {largest.nodes} nodes, converted in {largest.seconds:.2f} s.")
        print(f"Slowest conversion: {slowest.name}, {slowest.seconds:.2f} s.")


if __name__ == "__main__":
    main()
