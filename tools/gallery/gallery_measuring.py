"""Convert an entry of the gallery, compare the net with the author's call, and time both."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import torch
from gallery_entry import Entry
from timing import alternate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx.errors import SnnfxError
from snnfx.ops.run_loop import run_loop

__all__ = ["Row", "measure"]

TOLERANCE = 1e-9


@dataclass
class Row:
    """One row of the table.

    Args:
        conversion: seconds of processor time.
        regions: number of regions by kind, those of loops that the call contains included.
        kernels: number of regions of kind loop that run as a generated kernel.
        verified: "yes", or the reason why not.
        inference, training: time of the author's call divided by the time of the net; None if it was not measured.
    """

    name: str
    style: str
    takes: str
    shape: list[int]
    T: int
    conversion: float = 0.0
    regions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("fold", "loop", "map", "once"), 0))
    kernels: int = 0
    verified: str = "yes"
    inference: float | None = None
    training: float | None = None

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


def measure(entry: Entry, seconds: float) -> Row:
    """Convert, verify and time one model.

    Args:
        seconds: minimum time of each of the two timings; 0 to skip them.
    """
    torch.manual_seed(0)
    model, inputs = entry.make(), entry.inputs(entry.T)
    row = Row(entry.name, entry.style, entry.takes, list(inputs[0].shape), entry.T)
    try:
        net, row.conversion = _timed_conversion(entry, model)
    except SnnfxError as error:
        row.verified = str(error).partition("\n")[0]
        return row
    net.train()(*inputs)
    row.regions, row.kernels = _regions(net), _kernels_in_use(net)
    try:
        verify(entry)
    except (AssertionError, SnnfxError) as error:
        row.verified = str(error).partition("\n")[0]
    if seconds:
        author = entry.make()
        author.load_state_dict(model.state_dict())
        row.inference = _ratio(entry, author, net, inputs, seconds, training=False)
        row.training = _ratio(entry, author, net, inputs, seconds, training=True)
    return row


def _timed_conversion(entry: Entry, model: nn.Module) -> tuple[snnfx.Net, float]:
    """The net, and the processor time of the faster of two conversions: the first one also imports modules."""
    times: list[float] = []
    for _ in range(2):
        start = time.process_time()
        net = entry.convert(model)
        times.append(time.process_time() - start)
    return net, min(times)


def _nets(net: Any) -> Iterator[Any]:
    """The net, and the nets of the loops that it calls."""
    yield net
    for node in net.program.graph.nodes:
        if node.target is run_loop:
            yield from _nets(net.program.resolve(str(node.args[0].target)).net)


def _regions(net: Any) -> dict[str, int]:
    counts = Counter(region.kind for part in _nets(net) for region in part.regions)
    return {kind: counts[kind] for kind in ("fold", "loop", "map", "once")}


def _kernels_in_use(net: Any) -> int:
    """The number of loops that ran as kernels at the latest call."""
    modules = (module for part in _nets(net) for module in part.region_modules().values())
    return sum(getattr(getattr(module, "kernels", None), "in_use", None) is not None for module in modules)


def verify(entry: Entry) -> None:
    """Compare outputs, gradients and buffers with the author's call, in float64, in training and evaluation mode.

    Raises:
        AssertionError: a difference of more than 1e-9, or an output without any value that is not zero.
    """
    with _float64():
        torch.manual_seed(1)
        model = entry.make()
        net = entry.convert(copy.deepcopy(model))
        for T in dict.fromkeys((entry.T, entry.other_T or entry.T)):
            for training in (True, False):
                inputs = entry.inputs(T)
                author = copy.deepcopy(model).train(training)
                net.load_state_dict(copy.deepcopy(model.state_dict()))
                net.train(training)
                expected = _results(author, lambda *x, author=author: entry.run_as_author(author, *x), inputs)
                actual = _results(net, net, inputs)
                _compare(actual, expected, f"T = {T}, {'training' if training else 'evaluation'} mode")


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _results(module: nn.Module, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs, gradients of a random weighting of them, and buffers of fixed shape: the others are states."""
    shapes = {name: buffer.shape for name, buffer in module.named_buffers()}
    module.zero_grad()
    given = [x.clone().requires_grad_() for x in inputs]
    outputs = [y for y in pytree.tree_leaves(run(*given)) if isinstance(y, Tensor)]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.rand(y.shape, generator=generator) for y in outputs]
    sum((w * y).sum() for w, y in zip(weights, outputs, strict=True) if y.requires_grad).backward()  # type: ignore[union-attr]
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"gradient of input {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    results |= {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in module.named_buffers() if b.shape == shapes[name]}
    return results | {f"buffer {name}": buffer for name, buffer in buffers.items()}


def _compare(actual: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    if not all(value.any() for name, value in expected.items() if name.startswith("output")):
        raise AssertionError(f"an output is zero everywhere ({where})")
    for name, value in expected.items():
        other = actual.get(name, torch.zeros_like(value))
        if other.shape != value.shape:
            raise AssertionError(f"{name} has shape {list(other.shape)} instead of {list(value.shape)} ({where})")
        difference = (other - value).abs().max().item() if value.numel() else 0.0
        if not difference <= TOLERANCE * max(1.0, value.abs().max().item() if value.numel() else 0.0):
            raise AssertionError(f"{name} differs by {difference:.1e} ({where})")


def _ratio(
    entry: Entry, author: nn.Module, net: nn.Module, inputs: tuple[Tensor, ...], seconds: float, training: bool
) -> float:
    """Median processor time of the author's call divided by that of the net; the two alternate."""
    runs: dict[str, tuple[nn.Module, Callable[..., Any]]] = {
        "author": (author, lambda *x: entry.run_as_author(author, *x)),
        "net": (net, net),
    }
    calls = {name: _training_step(*run, inputs) if training else _inference(*run, inputs) for name, run in runs.items()}
    times = alternate(calls, seconds, clock=time.process_time)
    return times["author"] / times["net"]


def _inference(module: nn.Module, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    module.eval()

    def call() -> None:
        with torch.no_grad():
            run(*inputs)

    return call


def _training_step(module: nn.Module, run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    module.train()
    parameters = list(module.parameters())

    def call() -> None:
        outputs = [y for y in pytree.tree_leaves(run(*inputs)) if isinstance(y, Tensor) and y.requires_grad]
        sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]
        for parameter in parameters:  # like optimizer.zero_grad()
            parameter.grad = None

    return call
