"""Backpropagation through time (BPTT) in the memory of one chunk.

A window of time steps first runs chunk by chunk without gradients, saving the state at each chunk boundary. Then the
chunks run again with gradients, last chunk first: the gradient with respect to the state before a chunk is the incoming
gradient for the state after the previous one. Only one chunk at a time has an autograd graph, however far the gradients
flow; each further chunk costs the memory of one state (checkpointing: Griewank & Walther 2000, algorithm 799; here the
checkpoints are evenly spaced, as in Chen et al. 2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snnfx.online.losses import step_losses
from snnfx.online.step_replay import ReplayContext
from snnfx.online.training_call import State, TrainingCall, detached_state, require_differentiable
from snnfx.sandbox.torch_internals import pytree

__all__ = ["backward_window"]

StateGradients = dict[str, Tensor]
"""Gradients with respect to a state, by slot."""


def backward_window(call: TrainingCall, start: int, stop: int, chunk: int) -> None:
    """Accumulate the gradients of the steps from `start` to `stop`, including those through time between them.

    Args:
        call: the training call.
        start, stop: the window.
        chunk: number of time steps that have an autograd graph at once.
    """
    checkpoints: list[tuple[int, State, ReplayContext]] = []
    last = start
    while last + chunk < stop:
        checkpoints.append((last, call.state, call.nets.replay_context()))
        with torch.no_grad():
            y_seq, state, losses = _run_chunk(call, last, last + chunk, call.state)
        call.finish_steps(state, losses, y_seq, last + chunk)
        del y_seq, state, losses
        last += chunk
    before = _as_leaves(call.state) if checkpoints else call.state
    call.finish_steps(*_differentiate_chunk(call, last, stop, before, {}), stop)
    while checkpoints:
        gradients = _gradients_of(before)
        first, before, context = checkpoints.pop()
        before = _as_leaves(before) if checkpoints else before
        with context.restored():
            _differentiate_chunk(call, first, first + chunk, before, gradients)


def _run_chunk(call: TrainingCall, start: int, stop: int, state: State) -> tuple[Any, dict[str, Any], Tensor]:
    with call.updates.autocast(call.device):
        inputs = call.inputs(start, stop)
        y_seq, after = call.nets.sequence.run_bound(inputs, call.carried(start), state, stop - start)
        return y_seq, after, _losses_of(call, start, stop, y_seq)


def _losses_of(call: TrainingCall, start: int, stop: int, y_seq: Any) -> Tensor:
    targets = call.targets(slice(start, stop))
    return step_losses(call.loss, y_seq, targets, call.target_has_time, stop - start)


def _differentiate_chunk(
    call: TrainingCall, start: int, stop: int, before: State, after_gradients: StateGradients
) -> tuple[dict[str, Any], Tensor, Any]:
    """Run a chunk with gradients and backpropagate through it.

    Args:
        call: the training call.
        start, stop: the chunk.
        before: the state before it; where its tensors are leaves, their `.grad` receives the gradients.
        after_gradients: gradients of the later chunks with respect to the state after this one.

    Returns:
        The state after the chunk, the losses, and the outputs.
    """
    if call.rule.temporal == "layer":
        return _differentiate_layers(call, start, stop, before, after_gradients)
    y_seq, after, losses = _run_chunk(call, start, stop, before)
    loss = call.updates.scaled(require_differentiable(losses.sum() * call.scale))
    _backward([loss], [None], after, after_gradients)
    return after, losses, y_seq


def _differentiate_layers(
    call: TrainingCall, start: int, stop: int, before: State, after_gradients: StateGradients
) -> tuple[dict[str, Any], Tensor, Any]:
    """`_differentiate_chunk` with temporal credit within each layer and spatial credit between layers (OSTL).

    The chunk runs twice. In the first run no gradient flows between layers. In the second, none flows through time, and
    zero tensors that are added to the layer outputs receive the learning signals. These are then backpropagated through
    the graph of the first run.
    """
    nets, inputs, T = call.nets, call.inputs(start, stop), stop - start
    context = nets.replay_context()
    with call.updates.autocast(call.device):
        detached_outputs, layer_outputs, after = nets.run_separate_layers(inputs, call.carried(start), before, T)
        taps = [torch.zeros_like(value).requires_grad_(value.is_floating_point()) for value in layer_outputs]
        with context.restored():
            y_seq = nets.run_tapped_layers(inputs, taps, call.carried(start), detached_state(before), T)
        losses = _losses_of(call, start, stop, y_seq)
    loss = call.updates.scaled(require_differentiable(losses.sum() * call.scale))
    values = [*layer_outputs, *pytree.tree_leaves(detached_outputs)]
    tapped = [*taps, *pytree.tree_leaves(y_seq)]
    pairs = [
        (value, x)
        for value, x in zip(values, tapped, strict=True)
        if isinstance(value, Tensor) and value.requires_grad and x.requires_grad
    ]
    signals = torch.autograd.grad(loss, [x for _, x in pairs], allow_unused=True)
    reached = [(value, signal) for (value, _), signal in zip(pairs, signals, strict=True) if signal is not None]
    _backward([value for value, _ in reached], [signal for _, signal in reached], after, after_gradients)
    return after, losses, y_seq


def _backward(
    values: list[Tensor], gradients: list[Tensor | None], after: dict[str, Any], after_gradients: StateGradients
) -> None:
    states = [(after[name], gradient) for name, gradient in after_gradients.items() if after[name].requires_grad]
    torch.autograd.backward([*values, *(v for v, _ in states)], [*gradients, *(g for _, g in states)])


def _as_leaves(state: State) -> State:
    """Detach a state and make its floating-point tensors autograd leaves."""
    assert state is not None
    return {
        name: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in state.items()
    }


def _gradients_of(state: State) -> StateGradients:
    assert state is not None
    return {name: v.grad for name, v in state.items() if isinstance(v, Tensor) and v.grad is not None}
