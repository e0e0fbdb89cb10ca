"""Gradients at randomly sampled time steps (SLTT-K).

Every chunk runs once without gradients and records the states before the sampled steps. Given its state, a step does
not depend on the steps before it, so the sampled steps then run a second time with gradients, folded into one batch.
That is not equivalent if the steps draw random numbers, or if the first step has a graph of its own. Then every chunk
that contains a sampled step runs with gradients, and only the losses of the sampled steps are backpropagated; this
takes as long as the gradients of all steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.ir.program import StepProgram
from snnfx.online.losses import step_losses
from snnfx.online.training_call import TrainingCall, require_differentiable

__all__ = ["train_at_random_steps"]


def train_at_random_steps(call: TrainingCall, chunk: int) -> None:
    """Take gradients at K randomly sampled time steps; update once, after the sequence."""
    assert call.rule.random_steps is not None
    sampled = sorted(torch.randperm(call.T)[: call.rule.random_steps].tolist())
    call.updates.begin_call()
    if _can_fold_sampled_steps(call):
        _FoldedSampledSteps(call, chunk).run(sampled)
    else:
        _run_whole_chunks(call, sampled, chunk)
    call.update_count += call.updates.end_call()


def _can_fold_sampled_steps(call: TrainingCall) -> bool:
    return call.nets.has_uniform_steps and any(call.input_has_time) and call.nets.sequence.covers(call.inputs(0, 1))


def _run_with_gradients(call: TrainingCall, start: int, stop: int, sampled: Sequence[int]) -> None:
    """Run the steps from `start` to `stop` and backpropagate the losses of the sampled ones."""
    with call.updates.autocast(call.device):
        inputs, targets = call.inputs(start, stop), call.targets(slice(start, stop))
        y_seq, state = call.nets.sequence.run_bound(inputs, call.carried(start), call.state, stop - start)
        losses = step_losses(call.loss, y_seq, targets, call.target_has_time, stop - start)
        loss = require_differentiable(losses[[t - start for t in sampled]].sum() * call.scale)
    call.updates.backward(loss)
    call.finish_steps(state, losses, y_seq, stop)


def _run_whole_chunks(call: TrainingCall, sampled: Sequence[int], chunk: int) -> None:
    for start in range(0, call.T, chunk):
        stop = min(start + chunk, call.T)
        in_chunk = [t for t in sampled if start <= t < stop]
        if in_chunk:
            _run_with_gradients(call, start, stop, in_chunk)
        else:
            _run_without_gradients(call, start, stop, ())


def _run_without_gradients(call: TrainingCall, start: int, stop: int, record: Sequence[str]) -> dict[str, Tensor]:
    """Run the steps from `start` to `stop`; return the recorded slots after each of them, `[T, *]`."""
    with torch.no_grad(), call.updates.autocast(call.device):
        inputs = call.inputs(start, stop)
        y_seq, state, records = call.nets.run_recording(inputs, call.carried(start), call.state, stop - start, record)
        targets = call.targets(slice(start, stop))
        losses = step_losses(call.loss, y_seq, targets, call.target_has_time, stop - start)
    call.finish_steps(state, losses, y_seq, stop)
    return records


class _FoldedSampledSteps:
    """Record the states before the sampled steps, then run these steps folded into one batch.

    Args:
        call: the training call.
        chunk: number of steps per pass without gradients. A pass with gradients takes a quarter of it: with their
            states given, the steps form no loop that a kernel could run, so each of them saves more for backward.
    """

    def __init__(self, call: TrainingCall, chunk: int) -> None:
        self.call, self.chunk, self.most = call, chunk, math.ceil(chunk / 4)
        self.program = call.nets.sequence.program
        self.slots = [slot.name for slot in self.program.slots]
        self.changing_slots = [
            slot.name
            for slot, following in zip(self.program.slots, self.program.next_states, strict=True)
            if isinstance(following, Node) and following.name != slot.placeholder
        ]
        self.pending_steps: list[int] = []
        self.pending_states: dict[str, list[Tensor]] = {name: [] for name in self.slots}

    def run(self, sampled: Sequence[int]) -> None:
        """Run the whole sequence."""
        call, start = self.call, 0
        if sampled[0] == 0 and not self._has_known_first_state():
            _run_with_gradients(call, 0, 1, [0])
            start = 1
        while start < call.T:
            stop = min(start + self.chunk, call.T)
            steps = [t for t in sampled if start <= t < stop]
            before = call.state
            after = _run_without_gradients(call, start, stop, self.changing_slots if steps else ())
            if steps:
                self._record(steps, start, before, after)
            del before, after
            if len(self.pending_steps) >= self.most or stop == call.T:
                self._backward()
            start = stop

    def _has_known_first_state(self) -> bool:
        call = self.call
        if call.state is not None:
            return set(self.slots) <= call.state.keys()
        return not call.initial_arguments and _resets_to_numbers(self.program)

    def _record(
        self, steps: Sequence[int], start: int, before: dict[str, Any] | None, after: dict[str, Tensor]
    ) -> None:
        """Record the states before some steps of the chunk that begins at `start`."""
        assert self.call.state is not None
        includes_first = steps[0] == start
        index = torch.tensor([t - 1 - start for t in steps if t > start], dtype=torch.long, device=self.call.device)
        initial = dict(zip(self.slots, self.program.initial_values, strict=True))
        for name in self.slots:
            final = torch.as_tensor(self.call.state[name])
            if name not in self.changing_slots:
                self.pending_states[name].append(final.expand(len(steps), *final.shape))
                continue
            if includes_first:
                first = torch.as_tensor(initial[name] if before is None else before[name])
                self.pending_states[name].append(first.to(final).expand_as(final).unsqueeze(0))
            self.pending_states[name].append(_select_steps(after[name], index))
        self.pending_steps += steps

    def _backward(self) -> None:
        """Run the pending steps with gradients."""
        steps = self.pending_steps
        states = [_concatenated(self.pending_states[name]) for name in self.slots if steps]
        self.pending_steps, self.pending_states = [], {name: [] for name in self.slots}
        for start in range(0, len(steps), self.most):
            part = slice(start, start + self.most)
            self._backward_part(steps[part], [state[part] for state in states])

    def _backward_part(self, steps: Sequence[int], states: list[Tensor]) -> None:
        call, index = self.call, torch.tensor(steps, device=self.call.device)
        inputs = [x.index_select(0, index) if v else x for x, v in zip(call.leaves, call.input_has_time, strict=True)]
        with call.nets.replay_context().restored(), call.updates.autocast(call.device):
            y_seq = call.nets.run_from_states(inputs, states, len(steps))
            losses = step_losses(call.loss, y_seq, call.targets(index), call.target_has_time, len(steps))
            loss = require_differentiable(losses.sum() * call.scale)
        call.updates.backward(loss)


def _is_channels_last(x: Tensor) -> bool:
    """Whether images `[T, N, C, H, W]` are stored channels-last, as the layers of a net prefer them."""
    return x.dim() == 5 and x.stride(2) == 1 and not x.is_contiguous()


def _select_steps(x: Tensor, index: Tensor) -> Tensor:
    """Select time steps, preserving the memory format."""
    if not _is_channels_last(x):
        return x.index_select(0, index)
    return x.permute(0, 1, 3, 4, 2).index_select(0, index).permute(0, 1, 4, 2, 3)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate over time, preserving the memory format."""
    if not _is_channels_last(parts[-1]):
        return torch.cat(list(parts))
    return torch.cat([x.permute(0, 1, 3, 4, 2) for x in parts]).permute(0, 1, 4, 2, 3)


def _resets_to_numbers(program: StepProgram) -> bool:
    """Whether every slot is either reset to a number or drawn once per sequence and then constant."""
    return all(
        isinstance(initial, int | float) or (isinstance(following, Node) and following.name == slot.placeholder)
        for slot, following, initial in zip(program.slots, program.next_states, program.initial_values, strict=True)
    )
