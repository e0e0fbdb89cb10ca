"""Measure the time of each region of a call, forward and backward.

The call runs node by node. For the backward pass, the autograd graph is cut after each node: its outputs become leaves,
so the backward pass of each node runs, and is timed, on its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.inspect.profile.profiled_call import ProfiledCall
from snnfx.ops.run_loop import LoopHandle
from snnfx.sandbox.torch_internals import pytree

__all__ = ["measure_regions", "median_times"]

Times = dict[str, tuple[float, float]]
"""Region -> (forward seconds, backward seconds)."""


def median_times(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device, warm_up: int, repeats: int
) -> tuple[float, float]:
    """The median times in seconds of a forward pass, and of the backward pass of the same call.

    Args:
        forward: runs the forward pass.
        backward: runs the backward pass; gets the result of `forward`.
        device: the device to wait for.
        warm_up: calls before the first measured one.
        repeats: measured calls.
    """
    times: list[tuple[float, float]] = []
    for _ in range(warm_up + repeats):
        outputs, first = _timed(forward, device)
        times.append((first, _timed(partial(backward, outputs), device)[1]))
    measured = times[warm_up:]
    return statistics.median(t for t, _ in measured), statistics.median(t for _, t in measured)


def measure_regions(call: ProfiledCall, train: bool, warm_up: int, repeats: int) -> Times:
    """The median time of each region; "" is everything between regions.

    Args:
        call: the call.
        train: whether to run the backward pass as well, with a gradient of ones for each output.
        warm_up: calls before the first measured one.
        repeats: measured calls.
    """
    runs: list[Times] = []
    for index in range(warm_up + repeats):
        with torch.set_grad_enabled(train):
            timed = _TimedCall(call, train)
            outputs = call.run(timed)
            if train:
                timed.backward(outputs)
        if index >= warm_up:
            runs.append({name: (timed.forward[name], timed.backwards.get(name, 0.0)) for name in timed.forward})
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: (
            statistics.median(run.get(name, (0.0, 0.0))[0] for run in runs),
            statistics.median(run.get(name, (0.0, 0.0))[1] for run in runs),
        )
        for name in names
    }


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    _wait(device)
    start = time.perf_counter()
    value = run()
    _wait(device)
    return value, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _TimedCall:
    """Calls nodes, adds up their times by region, and runs their backward passes one by one."""

    def __init__(self, call: ProfiledCall, train: bool) -> None:
        self.call, self.train = call, train
        self.device = call.leaves[0].device if call.leaves else torch.device("cpu")
        self.forward: dict[str, float] = {}
        self.backwards: dict[str, float] = {}
        self._tape: list[tuple[str, list[Tensor], list[Tensor], list[Tensor]]] = []
        self._gradients: dict[int, Tensor] = {}

    def __call__(self, node: Node, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = self.call.part_of(node)
        value, seconds = _timed(lambda: function(*args, **kwargs), self.device)
        self.forward[name] = self.forward.get(name, 0.0) + seconds
        return self._cut(name, value, [function, args, kwargs]) if self.train else value

    def _cut(self, name: str, value: Any, operands: Any) -> Any:
        """Replace the outputs of a node by leaves."""
        flat, spec = pytree.tree_flatten(value)
        made = [y for y in flat if isinstance(y, Tensor) and y.grad_fn is not None]
        if not made:
            return value
        leaves = {id(y): y.detach().requires_grad_() for y in made}
        inputs = {id(x): x for x in _tensors(pytree.tree_leaves(operands)) if x.requires_grad and x.is_leaf}
        unique = list({id(y): y for y in made}.values())
        self._tape.append((name, unique, [leaves[id(y)] for y in unique], list(inputs.values())))
        return pytree.tree_unflatten([leaves.get(id(y), y) for y in flat], spec)

    def backward(self, outputs: Any) -> None:
        """Run the backward passes in reverse order."""
        for y in pytree.tree_leaves(outputs):
            if isinstance(y, Tensor) and y.requires_grad:
                self._accumulate(y, torch.ones_like(y))
        while self._tape:
            name, made, leaves, inputs = self._tape.pop()
            pairs = [
                (y, self._gradients.pop(id(leaf)))
                for y, leaf in zip(made, leaves, strict=True)
                if id(leaf) in self._gradients
            ]
            if not pairs or not inputs:
                continue
            values, gradients = zip(*pairs, strict=True)

            def run(values: Any = values, gradients: Any = gradients, inputs: Any = inputs) -> tuple[Any, ...]:
                return tuple(torch.autograd.grad(values, inputs, gradients, allow_unused=True))

            found, seconds = _timed(run, self.device)
            self.backwards[name] = self.backwards.get(name, 0.0) + seconds
            for x, gradient in zip(inputs, found, strict=True):
                if gradient is not None and not isinstance(x, nn.Parameter):
                    self._accumulate(x, gradient)

    def _accumulate(self, leaf: Tensor, gradient: Tensor) -> None:
        known = self._gradients.get(id(leaf))
        self._gradients[id(leaf)] = gradient if known is None else known + gradient


def _tensors(operands: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among operands, with the parameters of modules."""
    for operand in operands:
        if isinstance(operand, Tensor):
            yield operand
        elif isinstance(operand, nn.Module):
            yield from operand.parameters()
        elif isinstance(operand, LoopHandle):
            yield from operand.net.parameters()
        elif isinstance(getattr(operand, "__self__", None), Tensor):
            yield operand.__self__
