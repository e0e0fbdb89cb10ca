"""Check a LIF kernel on about 10**8 values against stepping the neurons, chunk by chunk.

    python tools/bench/check_large.py [--T 5] [--shape 3 5 1234567] [--chunk 500000] [--soft-reset] [--double]

The sizes are odd, so that no block of the kernel ends at the end of a row. The check compares the spikes of inference
and of training, the final membrane potentials, and the gradient of the input for random gradients of the spikes.
Different rounding can flip a spike whose potential is at the threshold; such neurons are counted and excluded from the
other comparisons. Exit status: 0 if everything else agrees, 1 if something differs, 2 if no kernel ran. The check needs
six times the memory of the values, 3 GB in single precision.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import snnfx

TOLERANCE = 1e-5
"""Tolerance for potentials and gradients in single precision, relative to the largest value."""
ROUNDINGS = 16
"""Allowed rounding difference between potentials, in units in the last place."""


@dataclass
class Difference:
    """Largest and mean difference of a quantity, and its largest value."""

    largest: float = 0.0
    scale: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        if expected.numel():
            difference = (actual - expected).abs()
            self.largest = max(self.largest, _largest(difference))
            self.scale = max(self.scale, _largest(expected.abs()))
            self.total += float(difference.double().sum())
            self.count += expected.numel()

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else self.largest

    def __str__(self) -> str:
        mean = self.total / max(self.count, 1)
        return f"largest difference {self.largest:.2g}, mean {mean:.2g}, of values up to {self.scale:.3g}"


@dataclass
class Comparison:
    """Results of the chunks compared so far."""

    spikes: int = 0
    flipped: int = 0
    wrong: int = 0
    margin: float = 0.0
    potentials: Difference = field(default_factory=Difference)
    gradients: Difference = field(default_factory=Difference)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--T", type=int, default=5, help="time steps")
    parser.add_argument("--shape", type=int, nargs="+", default=[3, 5, 1234567], help="shape of one step")
    parser.add_argument("--chunk", type=int, default=500_000, help="number of neurons to step at once")
    parser.add_argument("--soft-reset", action="store_true", help="subtract the threshold instead of resetting to 0")
    parser.add_argument("--double", action="store_true", help="use float64")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    dtype = torch.float64 if options.double else torch.float32
    neuron = snnfx.neuron.LIFNode(tau=2.0, v_reset=None if options.soft_reset else 0.0)
    net = snnfx.convert(neuron)
    shape = (options.T, *options.shape)
    print(f"{math.prod(shape):,} values of {dtype}: {options.T} steps of {' x '.join(map(str, options.shape))} neurons")

    x_seq = torch.empty(shape, dtype=dtype).uniform_(0.0, 2.5)
    weights = torch.empty(shape, dtype=dtype).uniform_(-1.0, 1.0)
    start = time.perf_counter()
    with torch.no_grad():
        inferred = net(x_seq)
    x_seq.requires_grad_()
    y_seq, state = net.run(x_seq)
    y_seq.backward(weights)
    seconds = time.perf_counter() - start
    kernels = getattr(next(iter(net.region_modules().values())), "kernels", None)
    if kernels is None or kernels.in_use is None:
        print(f"no kernel ran: {kernels.refusal if kernels is not None else 'the loop is not lowered'}")
        return 2
    same = torch.equal(inferred, y_seq)
    del inferred
    print(f"kernel: inference, forward and backward in {seconds:.1f} s with {torch.get_num_threads()} threads")

    assert x_seq.grad is not None
    tensors = (x_seq.detach(), y_seq.detach(), weights, x_seq.grad)
    x_flat, y_flat, weights, grad = (t.view(options.T, -1) for t in tensors)
    last = state["v"].detach().view(-1)
    start, found = time.perf_counter(), Comparison()
    for first in range(0, last.numel(), options.chunk):
        part = slice(first, first + options.chunk)
        compare(found, neuron, x_flat[:, part], y_flat[:, part], weights[:, part], grad[:, part], last[part])
    print(f"stepped in {time.perf_counter() - start:.1f} s, {options.chunk:,} neurons at once")
    return show(found, same, math.prod(shape), dtype)


def compare(
    found: Comparison, neuron: Any, x_seq: Tensor, y_seq: Tensor, weights: Tensor, grad: Tensor, last: Tensor
) -> None:
    """Step some of the neurons, `[T, n]`, and add the differences."""
    stepped = copy.deepcopy(neuron)
    inputs = x_seq.clone().requires_grad_()
    expected = torch.stack([stepped(x) for x in inputs])
    expected.backward(weights)
    right = inputs.grad
    assert right is not None
    potential: Tensor = stepped.v.detach()
    expected = expected.detach()
    found.spikes += int(expected.sum())
    differs = y_seq != expected
    flips = differs.any(0)
    if flips.any():
        margins = distances(neuron, x_seq[:, flips], expected[:, flips], differs[:, flips])
        found.flipped += margins.numel()
        found.wrong += int((margins > allowed(x_seq)).sum())
        found.margin = max(found.margin, _largest(margins))
        grad, right = grad[:, ~flips], right[:, ~flips]
        last, potential = last[~flips], potential[~flips]
    found.potentials.add(last, potential)
    found.gradients.add(grad, right)


def distances(neuron: Any, x_seq: Tensor, y_seq: Tensor, differs: Tensor) -> Tensor:
    """Distance of each neuron from its threshold at the first spike that differs, in float64: `[n]`."""
    first = differs.int().argmax(0)
    v = torch.zeros(x_seq.shape[1], dtype=torch.float64)
    found = torch.full_like(v, torch.inf)
    for t, (x, spike) in enumerate(zip(x_seq.double(), y_seq.double(), strict=True)):
        h = v + (x - v) / neuron.tau
        found = torch.where(first == t, (h - neuron.v_threshold).abs(), found)
        v = h - spike * neuron.v_threshold if neuron.v_reset is None else (1 - spike) * h + spike * neuron.v_reset
    return found


def allowed(x_seq: Tensor) -> float:
    """Largest rounding difference of a potential, for inputs up to 2.5."""
    return ROUNDINGS * torch.finfo(x_seq.dtype).eps * 2.5


def show(found: Comparison, same: bool, values: int, dtype: torch.dtype) -> int:
    """Print the results and return the exit status."""
    limit = TOLERANCE * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    print(
        f"spikes: {found.spikes / values:.1%} of the values; inference {'equals' if same else 'DIFFERS FROM'} training"
    )
    print(f"neurons with a flipped spike: {found.flipped}, not explained by rounding: {found.wrong}")
    if found.flipped:
        margin = f"largest |v - threshold| {found.margin:.2g}"
        print(f"    {margin}, explained by rounding up to {allowed(torch.empty(0, dtype=dtype)):.2g}")
    checked = {"final potentials": found.potentials, "gradients of the input": found.gradients}
    for name, difference in checked.items():
        verdict = "" if difference.relative <= limit else f"  EXCEEDS the tolerance of {limit:.1g}"
        print(f"{name}: {difference}{verdict}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.1f} GB")
    failed = not same or found.wrong > 0 or any(d.relative > limit for d in checked.values())
    print("FAILED" if failed else "passed")
    return int(failed)


def _largest(x: Tensor) -> float:
    """The largest value; infinity if any value is NaN."""
    value = float(x.max())
    return math.inf if math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
