"""How a rule goes through a sequence: in chunks, or in single steps.

In chunks, the gradients of all steps of a chunk come from one folded forward and backward pass. Where the weights
change at every step, the form of the net that takes one step is run.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from snnfx.analysis.leak import cached_constant_leaks
from snnfx.online.fptt import FPTTSequence
from snnfx.online.losses import scalar
from snnfx.online.reverse_sweep import backward_stretch
from snnfx.online.sequence_run import SequenceRun, State, with_gradient
from snnfx.online.thread_count import is_small, one_thread
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree

__all__ = ["run_chunks", "run_steps"]


def run_chunks(run: SequenceRun, chunk: int) -> None:
    """Gradients of a stretch of steps at a time; updates at the end, or every K steps."""
    every = run.rule.update if isinstance(run.rule.update, int) else run.T
    start = 0
    run.updates.begin_call()
    while start < run.T:
        if every != run.T and start % every == 0 and start > 0:
            run.updates.zero()
        stop = _end_of_stretch(run, start, chunk)
        backward_stretch(run, start, stop, chunk)
        if stop % every == 0 and stop < run.T:
            run.updates.apply()
            run.update_count += 1
        start = stop
    run.update_count += run.updates.end_call()


def _end_of_stretch(run: SequenceRun, start: int, chunk: int) -> int:
    """Where no gradient goes on through time: after K steps, at an update, after a chunk if none goes at all."""
    rule = run.rule
    ends = [(start // every + 1) * every for every in (rule.temporal, rule.update) if isinstance(every, int)]
    return min([run.T, *ends, *([] if rule.goes_through_time else [start + chunk])])


def run_steps(run: SequenceRun, averages: list[Tensor] | None) -> None:
    """An update at every step.

    Args:
        run: the sequence.
        averages: the running averages of FPTT, whose elements are replaced; None for rules without.
    """
    net, extra = run.nets.step, None
    if run.rule.extra is not None:
        assert averages is not None
        extra = FPTTSequence(run.rule.extra, run.updates, averages)
    small = is_small(run.updates.parameters, run.nets.step_elements)
    with one_thread() if small else contextlib.nullcontext(), cached_constant_leaks():
        for t in range(run.T):
            _run_step(run, net, t, extra)


def _run_step(run: SequenceRun, net: Net, t: int, extra: FPTTSequence | None) -> None:
    """A step, and the update after it."""
    x, target, before = run.inputs_at(t), run.targets(t), run.state

    def step_and_loss(state: State) -> tuple[Any, State, Tensor, Tensor]:
        with run.updates.autocast(run.device):
            y, after = net.run_bound(x, run.carried(t), state, None)
            value = scalar(run.loss(y, target))
            return y, after, value, with_gradient(value if run.scale == 1.0 else value * run.scale)

    y, after, value, loss = step_and_loss(before)
    run.finish_steps(after, value, _with_time(y) if run.keep_outputs else None, t + 1)
    if extra is None:
        run.updates.zero()
        run.updates.backward(loss)
        run.updates.apply()
    else:
        extra.update(loss, t == run.T - 1, before, run.state, step_and_loss)
    run.update_count += 1


def _with_time(y: Any) -> Any:
    return y.unsqueeze(0) if isinstance(y, Tensor) else pytree.tree_map_only(Tensor, lambda v: v.unsqueeze(0), y)
