"""Gradients at some steps of a sequence, drawn at random (SLTT-K).

Every chunk is run once without gradients, and the states before the chosen steps are noted down. A step whose state is
known has no past, so those steps are then run once more, all at once and folded, with gradients. Where that would not
be the same (random numbers are drawn at each step, or the first step is another one), a chunk with chosen steps is run
with gradients, of which only theirs are asked for: it takes as long as all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.ir.program import StepProgram
from snnfx.online.losses import losses_of_steps
from snnfx.online.sequence_run import SequenceRun, with_gradient

__all__ = ["run_random_steps"]


def run_random_steps(run: SequenceRun, chunk: int) -> None:
    """Gradients at steps drawn at random, one update after the sequence."""
    assert run.rule.random_steps is not None
    chosen = sorted(torch.randperm(run.T)[: run.rule.random_steps].tolist())
    run.updates.begin_call()
    if _may_be_taken_together(run):
        _KnownStates(run, chunk).run(chosen)
    else:
        _run_with_gradients(run, chosen, chunk)
    run.update_count += run.updates.end_call()


def _may_be_taken_together(run: SequenceRun) -> bool:
    return run.nets.has_known_form and any(run.varying) and run.nets.sequence.covers(run.inputs(0, 1))


def _run_steps_with_gradients(run: SequenceRun, start: int, stop: int, chosen: Sequence[int]) -> None:
    """Some steps, with the gradients of those that are chosen among them."""
    with run.updates.autocast(run.device):
        inputs, targets = run.inputs(start, stop), run.targets(slice(start, stop))
        y_seq, state = run.nets.sequence.run_bound(inputs, run.carried(start), run.state, stop - start)
        losses = losses_of_steps(run.loss, y_seq, targets, run.target_has_time, stop - start)
        loss = with_gradient(losses[[t - start for t in chosen]].sum() * run.scale)
    run.updates.backward(loss)
    run.finish_steps(state, losses, y_seq, stop)


def _run_with_gradients(run: SequenceRun, chosen: Sequence[int], chunk: int) -> None:
    for start in range(0, run.T, chunk):
        stop = min(start + chunk, run.T)
        here = [t for t in chosen if start <= t < stop]
        if here:
            _run_steps_with_gradients(run, start, stop, here)
        else:
            _run_without_gradients(run, start, stop, ())


def _run_without_gradients(run: SequenceRun, start: int, stop: int, record: Sequence[str]) -> dict[str, Tensor]:
    """Some steps, and the values of some slots after each of them, `[T, *]`."""
    with torch.no_grad(), run.updates.autocast(run.device):
        inputs = run.inputs(start, stop)
        y_seq, state, records = run.nets.run_recording(inputs, run.carried(start), run.state, stop - start, record)
        targets = run.targets(slice(start, stop))
        losses = losses_of_steps(run.loss, y_seq, targets, run.target_has_time, stop - start)
    run.finish_steps(state, losses, y_seq, stop)
    return records


class _KnownStates:
    """The chosen steps wait with the states before them until they are run together.

    Args:
        run: the sequence.
        chunk: how many steps are run at once without gradients. With gradients it is a quarter of that: known steps are
            no loop, for which there would be a kernel, so each of them keeps more.
    """

    def __init__(self, run: SequenceRun, chunk: int) -> None:
        self.run_of, self.chunk, self.most = run, chunk, math.ceil(chunk / 4)
        self.program = run.nets.sequence.program
        self.slots = [slot.name for slot in self.program.slots]
        self.written = [
            slot.name
            for slot, following in zip(self.program.slots, self.program.next_states, strict=True)
            if isinstance(following, Node) and following.name != slot.placeholder
        ]
        self.waiting: list[int] = []
        self.states: dict[str, list[Tensor]] = {name: [] for name in self.slots}

    def run(self, chosen: Sequence[int]) -> None:
        """Go through the sequence."""
        run, start = self.run_of, 0
        if chosen[0] == 0 and not self._knows_first_state():
            _run_steps_with_gradients(run, 0, 1, [0])
            start = 1
        while start < run.T:
            stop = min(start + self.chunk, run.T)
            steps = [t for t in chosen if start <= t < stop]
            before = run.state
            after = _run_without_gradients(run, start, stop, self.written if steps else ())
            if steps:
                self._note(steps, start, before, after)
            del before, after
            if len(self.waiting) >= self.most or stop == run.T:
                self._backward()
            start = stop

    def _knows_first_state(self) -> bool:
        run = self.run_of
        if run.state is not None:
            return set(self.slots) <= run.state.keys()
        return not run.given and _starts_from_numbers(self.program)

    def _note(self, steps: Sequence[int], start: int, before: dict[str, Any] | None, after: dict[str, Tensor]) -> None:
        """Keep the states before some steps of the chunk that begins at `start`."""
        assert self.run_of.state is not None
        is_first = steps[0] == start
        index = torch.tensor([t - 1 - start for t in steps if t > start], dtype=torch.long, device=self.run_of.device)
        initial = dict(zip(self.slots, self.program.initial_values, strict=True))
        for name in self.slots:
            final = torch.as_tensor(self.run_of.state[name])
            if name not in self.written:  # held, or always the same
                self.states[name].append(final.expand(len(steps), *final.shape))
                continue
            if is_first:
                first = torch.as_tensor(initial[name] if before is None else before[name])
                self.states[name].append(first.to(final).expand_as(final).unsqueeze(0))
            self.states[name].append(_picked(after[name], index))
        self.waiting += steps

    def _backward(self) -> None:
        """Run the waiting steps with gradients."""
        steps, states = self.waiting, [_joined(self.states[name]) for name in self.slots if self.waiting]
        self.waiting, self.states = [], {name: [] for name in self.slots}
        for start in range(0, len(steps), self.most):
            part = slice(start, start + self.most)
            self._backward_part(steps[part], [state[part] for state in states])

    def _backward_part(self, steps: Sequence[int], states: list[Tensor]) -> None:
        run, index = self.run_of, torch.tensor(steps, device=self.run_of.device)
        inputs = [x.index_select(0, index) if v else x for x, v in zip(run.leaves, run.varying, strict=True)]
        with run.nets.moment().again(), run.updates.autocast(run.device):
            y_seq = run.nets.run_known(inputs, states, len(steps))
            losses = losses_of_steps(run.loss, y_seq, run.targets(index), run.target_has_time, len(steps))
            loss = with_gradient(losses.sum() * run.scale)
        run.updates.backward(loss)


def _has_channels_inside(x: Tensor) -> bool:
    """Whether images `[T, N, C, H, W]` have their channels innermost in memory, as the layers of a net want them."""
    return x.dim() == 5 and x.stride(2) == 1 and not x.is_contiguous()


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """Some time steps, in the layout of all."""
    if not _has_channels_inside(x):
        return x.index_select(0, index)
    return x.permute(0, 1, 3, 4, 2).index_select(0, index).permute(0, 1, 4, 2, 3)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if not _has_channels_inside(parts[-1]):
        return torch.cat(list(parts))
    return torch.cat([x.permute(0, 1, 3, 4, 2) for x in parts]).permute(0, 1, 4, 2, 3)


def _starts_from_numbers(program: StepProgram) -> bool:
    """Whether the reset state is made of numbers, apart from what is drawn once and never written again."""
    return all(
        isinstance(initial, int | float) or (isinstance(following, Node) and following.name == slot.placeholder)
        for slot, following, initial in zip(program.slots, program.next_states, program.initial_values, strict=True)
    )
