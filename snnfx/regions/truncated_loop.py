"""Loops of an online rule, in the forms that they have instead of T steps under autograd.

`CutLoopRegion`: no gradient goes through the state, so only the states have to be stepped, without gradients; after
that every step is a function of its inputs and a known state, and all of them are evaluated at once, folded.
`TraceRegion`: an eligibility trace, `a[t] = leak * a[t-1] + x[t]`, one addition in place for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.functional import seq_to_ann_forward
from snnfx.ops.online_functions import update_trace
from snnfx.ops.sequence_functions import stack_steps
from snnfx.regions.region_modules import LoopRegion, RegionGraph

__all__ = ["CutLoopRegion", "TraceRegion"]

_ELEMENTS_AT_ONCE = 2**18
"""How many elements of its largest input a folded evaluation takes at once: what stays in the cache from one operation
to the next is faster than what does not, and steps are independent here."""


class CutLoopRegion(LoopRegion):
    """A loop all of whose states are read without history.

    Args:
        label, step, first: as for `LoopRegion`.
        start: `(*constants, *inputs) -> (states before the first step, states after it)`, from the reset state.
        advance: `(*constants, *inputs, state) -> ((), states)`.
        outputs: `(*constants, *inputs, state) -> (outputs, ())`, which may be folded.
        input_dims, state_dims, output_dims: where the batch of each of them is in one step.
    """

    cut = True

    def __init__(
        self,
        label: str,
        step: RegionGraph,
        first: RegionGraph,
        start: RegionGraph,
        advance: RegionGraph,
        outputs: RegionGraph,
        input_dims: Sequence[int],
        state_dims: Sequence[int],
        output_dims: Sequence[int],
    ) -> None:
        super().__init__(label, step, first)
        self.start, self.advance, self.outputs = start, advance, outputs
        self.batch_dims = (tuple(input_dims), tuple(state_dims), tuple(output_dims))

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """All steps of a sequence: `(outputs [T, *], final state)`, gradients without a loop over time."""
        if not torch.is_grad_enabled() or self.runs_as_operator(constants):
            return super().multi_step(x_seq, state, constants)
        done = None if self.kernels is None else self.kernels.run(x_seq, state, constants)
        if done is not None:
            return done
        state_seq, final = self.states_before(x_seq, state, constants)
        return self.all_steps(x_seq, state_seq, constants), final

    def states_before(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The state before each step, `[T, *]` for each slot, and the one after the last; without gradients."""
        kept: list[tuple[Any, ...]] = []
        with torch.no_grad():
            steps = list(zip(*(x.unbind(0) for x in x_seq), strict=True))
            if state is None:
                before, state = self.start(*constants, *steps[0])
                kept.append(before)
                steps = steps[1:]
            advance = self.advance.forward
            for x in steps:
                kept.append(state)
                _, state = advance(*constants, *x, state)
            device = x_seq[0].device
            return tuple(stack_steps(s, device) for s in zip(*kept, strict=True)), state

    def all_steps(
        self, x_seq: tuple[Tensor, ...], state_seq: tuple[Tensor, ...], constants: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        """The outputs of all steps from known states, folded, a block of steps at a time."""
        T = x_seq[0].shape[0]
        largest = max(x[0].numel() for x in x_seq)
        block = max(1, _ELEMENTS_AT_ONCE // max(1, largest))
        if block >= T:
            return self._folded(x_seq, state_seq, constants)
        sequences = [value.split(block) for value in (*x_seq, *state_seq)]
        count = len(x_seq)
        parts = [self._folded(piece[:count], piece[count:], constants) for piece in zip(*sequences, strict=True)]
        return tuple(torch.cat(y) for y in zip(*parts, strict=True))

    def _folded(
        self, x_seq: Sequence[Tensor], state_seq: Sequence[Tensor], constants: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        count, fixed = len(x_seq), len(constants)
        input_dims, state_dims, output_dims = self.batch_dims

        def step(*arguments: Any) -> tuple[Tensor, ...]:
            return self.outputs.forward(*arguments[: fixed + count], arguments[fixed + count :])[0]  # type: ignore[no-any-return]

        return seq_to_ann_forward(  # type: ignore[no-any-return]
            (*x_seq, *state_seq),
            step,
            constants=constants,
            batch_dim=(*input_dims, *state_dims),
            out_batch_dim=output_dims,
        )


class TraceRegion(LoopRegion):
    """One eligibility trace.

    Args:
        label, step, first: as for `LoopRegion`.
        leak: a number; None: it is the constant of the region.
    """

    cut = True

    def __init__(self, label: str, step: RegionGraph, first: RegionGraph, leak: float | None) -> None:
        super().__init__(label, step, first)
        self.leak = leak

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The trace after each step, `[T, *]`, and the last of them."""
        if self.runs_as_operator(constants):
            return super().multi_step(x_seq, state, constants)
        leak = constants[0] if self.leak is None else self.leak
        operand = x_seq[0].detach()
        with torch.no_grad():
            first = update_trace(state[0] if state is not None else 0.0, operand[0], leak)
            trace = torch.empty_like(operand, dtype=first.dtype)  # in the memory format of the operand
            steps = trace.unbind(0)
            steps[0].copy_(first)
            for t, x in enumerate(operand.unbind(0)[1:]):
                torch.add(x, steps[t], alpha=leak, out=steps[t + 1])
            return (trace,), (trace[-1].clone(),)
