"""Update schedules: an update after the sequence, after every K steps, or after every step.

Unless the weights change at every step, one folded forward and backward pass gives the gradients of a whole chunk.
For an update at every step, the single-step form of the net runs instead.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from snnfx.analysis.leak import cached_constant_leaks
from snnfx.online.chunked_bptt import backward_window
from snnfx.online.fptt import FPTTUpdater
from snnfx.online.losses import as_scalar
from snnfx.online.thread_count import is_small_step, one_thread
from snnfx.online.training_call import State, TrainingCall, require_differentiable
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree

__all__ = ["train_in_chunks", "train_step_by_step"]


def train_in_chunks(call: TrainingCall, chunk: int) -> None:
    """Accumulate gradients window by window; update after the sequence, or after every K steps."""
    interval = call.rule.update if isinstance(call.rule.update, int) else call.T
    start = 0
    call.updates.begin_call()
    while start < call.T:
        if interval != call.T and start % interval == 0 and start > 0:
            call.updates.clear_gradients()
        stop = _window_end(call, start, chunk)
        backward_window(call, start, stop, chunk)
        if stop % interval == 0 and stop < call.T:
            call.updates.optimizer_step()
            call.update_count += 1
        start = stop
    call.update_count += call.updates.end_call()


def _window_end(call: TrainingCall, start: int, chunk: int) -> int:
    """End of the window within which gradients flow through time.

    It is the next truncation (every K steps) or update, or the end of the chunk for rules without temporal credit.
    """
    rule = call.rule
    ends = [(start // every + 1) * every for every in (rule.temporal, rule.update) if isinstance(every, int)]
    return min([call.T, *ends, *([] if rule.has_temporal_credit else [start + chunk])])


def train_step_by_step(call: TrainingCall, fptt: FPTTUpdater | None = None) -> None:
    """Update the weights after every time step.

    Args:
        call: the training call.
        fptt: runs the updates of FPTT; None for other rules.
    """
    net = call.nets.step
    is_small = is_small_step(call.updates.parameters, call.nets.step_elements)
    with one_thread() if is_small else contextlib.nullcontext(), cached_constant_leaks():
        for t in range(call.T):
            _train_step(call, net, t, fptt)


def _train_step(call: TrainingCall, net: Net, t: int, fptt: FPTTUpdater | None) -> None:
    """Run one time step and update the weights."""
    x, target, before = call.inputs_at(t), call.targets(t), call.state

    def step_and_loss(state: State) -> tuple[Any, State, Tensor, Tensor]:
        with call.updates.autocast(call.device):
            y, after = net.run_bound(x, call.carried(t), state, None)
            value = as_scalar(call.loss(y, target))
            return y, after, value, require_differentiable(value if call.scale == 1.0 else value * call.scale)

    y, after, value, loss = step_and_loss(before)
    call.finish_steps(after, value, _with_time_dim(y) if call.keep_outputs else None, t + 1)
    if fptt is None:
        call.updates.clear_gradients()
        call.updates.backward(loss)
        call.updates.optimizer_step()
    else:
        fptt.update(loss, t == call.T - 1, before, call.state, step_and_loss)
    call.update_count += 1


def _with_time_dim(y: Any) -> Any:
    return y.unsqueeze(0) if isinstance(y, Tensor) else pytree.tree_map_only(Tensor, lambda v: v.unsqueeze(0), y)
