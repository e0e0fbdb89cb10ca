"""Gradients through time in the memory of a chunk.

A stretch of steps is run chunk by chunk without gradients, and the states at the borders are kept; then the chunks are
run again, the last one first, and the gradient that arrives at the state before a chunk goes on from the state after
the one before it. So one chunk is differentiated at a time, whatever goes through time and however far. What is kept
for each chunk is one state (Griewank & Walther 2000, algorithm 799: checkpoints, here evenly spaced; Chen et al. 2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snnfx.online.losses import losses_of_steps
from snnfx.online.repeated_steps import RepeatContext
from snnfx.online.sequence_run import SequenceRun, State, with_gradient
from snnfx.sandbox.torch_internals import pytree

__all__ = ["backward_stretch"]

Adjoints = dict[str, Tensor]
"""Gradients with respect to the state after some step, by slot."""


def backward_stretch(run: SequenceRun, start: int, stop: int, chunk: int) -> None:
    """Add the gradients of the steps from `start` to `stop`, which go through time between them.

    Args:
        run: the sequence.
        start, stop: the stretch.
        chunk: how many steps are differentiated at once.
    """
    borders: list[tuple[int, State, RepeatContext]] = []
    last = start
    while last + chunk < stop:
        borders.append((last, run.state, run.nets.moment()))
        with torch.no_grad():
            y_seq, state, losses = _run_chunk(run, last, last + chunk, run.state)
        run.finish_steps(state, losses, y_seq, last + chunk)
        del y_seq, state, losses
        last += chunk
    before = _leaves(run.state) if borders else run.state
    run.finish_steps(*_differentiate(run, last, stop, before, {}), stop)
    while borders:
        adjoints = _gradients(before)
        first, before, moment = borders.pop()
        before = _leaves(before) if borders else before
        with moment.again():
            _differentiate(run, first, first + chunk, before, adjoints)


def _run_chunk(run: SequenceRun, start: int, stop: int, state: State) -> tuple[Any, dict[str, Any], Tensor]:
    with run.updates.autocast(run.device):
        y_seq, after = run.nets.sequence.run_bound(run.inputs(start, stop), run.carried(start), state, stop - start)
        return y_seq, after, _losses(run, start, stop, y_seq)


def _losses(run: SequenceRun, start: int, stop: int, y_seq: Any) -> Tensor:
    targets = run.targets(slice(start, stop))
    return losses_of_steps(run.loss, y_seq, targets, run.target_has_time, stop - start)


def _differentiate(
    run: SequenceRun, start: int, stop: int, before: State, adjoints: Adjoints
) -> tuple[dict[str, Any], Tensor, Any]:
    """Run a chunk and add its gradients: `(state after it, losses, outputs)`.

    Args:
        run: the sequence.
        start, stop: the chunk.
        before: the state before it, whose gradients are left in it.
        adjoints: of the state after it.
    """
    if run.rule.temporal == "layer":
        return _differentiate_layers(run, start, stop, before, adjoints)
    y_seq, after, losses = _run_chunk(run, start, stop, before)
    loss = run.updates.scaled(with_gradient(losses.sum() * run.scale))
    _backward([loss], [None], after, adjoints)
    return after, losses, y_seq


def _differentiate_layers(
    run: SequenceRun, start: int, stop: int, before: State, adjoints: Adjoints
) -> tuple[dict[str, Any], Tensor, Any]:
    """The same with gradients through time in each layer, and through the layers in each step."""
    nets, inputs, T = run.nets, run.inputs(start, stop), stop - start
    moment = nets.moment()
    with run.updates.autocast(run.device):
        own_outputs, leaving, after = nets.run_layers(inputs, run.carried(start), before, T)
        taps = [torch.zeros_like(value).requires_grad_(value.is_floating_point()) for value in leaving]
        with moment.again():
            y_seq = nets.run_between_layers(inputs, taps, run.carried(start), _detached(before), T)
        losses = _losses(run, start, stop, y_seq)
    loss = run.updates.scaled(with_gradient(losses.sum() * run.scale))
    outputs = pytree.tree_leaves(own_outputs)
    asked = [*taps, *pytree.tree_leaves(y_seq)]
    pairs = [
        (value, x)
        for value, x in zip([*leaving, *outputs], asked, strict=True)
        if isinstance(value, Tensor) and value.requires_grad and x.requires_grad
    ]
    signals = torch.autograd.grad(loss, [x for _, x in pairs], allow_unused=True)
    found = [(value, signal) for (value, _), signal in zip(pairs, signals, strict=True) if signal is not None]
    _backward([value for value, _ in found], [signal for _, signal in found], after, adjoints)
    return after, losses, y_seq


def _backward(values: list[Tensor], gradients: list[Tensor | None], after: dict[str, Any], adjoints: Adjoints) -> None:
    later = [(after[name], adjoint) for name, adjoint in adjoints.items() if after[name].requires_grad]
    torch.autograd.backward([*values, *(v for v, _ in later)], [*gradients, *(g for _, g in later)])


def _detached(state: State) -> State:
    return None if state is None else {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}


def _leaves(state: State) -> State:
    """A state whose gradients can be asked for."""
    assert state is not None
    return {
        name: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in state.items()
    }


def _gradients(state: State) -> Adjoints:
    assert state is not None
    return {name: v.grad for name, v in state.items() if isinstance(v, Tensor) and v.grad is not None}
