"""Loops of online learning rules, run without T steps under autograd.

`CutLoopRegion`: no gradient flows through the state. The states are stepped without gradients; every step is then a
function of its inputs and a known state, and all steps are evaluated at once, folded into the batch.
`TraceRegion`: an eligibility trace, `a[t] = leak * a[t-1] + x[t]`, one in-place addition for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.functional import seq_to_ann_forward
from snnfx.ops.online_functions import update_trace
from snnfx.ops.sequence_functions import stack_steps
from snnfx.regions.region_modules import LoopRegion
from snnfx.regions.sequence_region import RegionGraph

__all__ = ["CutLoopRegion", "TraceRegion"]

_ELEMENTS_AT_ONCE = 2**18
"""Elements of the largest input in one folded evaluation, so that values stay in the cache between operations."""


class CutLoopRegion(LoopRegion):
    """A loop whose states are all detached before they are read.

    Args:
        label, step, first: as for `LoopRegion`.
        start: `(*constants, *inputs) -> (states before the first step, states after it)`, from the reset state.
        advance: `(*constants, *inputs, state) -> ((), states)`.
        outputs: `(*constants, *inputs, state) -> (outputs, ())`, foldable.
        input_dims, state_dims, output_dims: the batch dimension of each of them in one step.
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
        """Run all steps of a sequence, `(outputs [T, *], final state)`; gradients need no loop over time."""
        if not torch.is_grad_enabled() or self.runs_as_operator(constants):
            return super().multi_step(x_seq, state, constants)
        results = None if self.kernels is None else self.kernels.run(x_seq, state, constants)
        if results is not None:
            return results
        state_seq, final = self.states_before(x_seq, state, constants)
        return self.all_steps(x_seq, state_seq, constants), final

    def states_before(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The states before each step, `[T, *]` for each slot, and the final states; without gradients."""
        states_seq: list[tuple[Any, ...]] = []
        with torch.no_grad():
            steps = list(zip(*(x.unbind(0) for x in x_seq), strict=True))
            if state is None:
                before, state = self.start(*constants, *steps[0])
                states_seq.append(before)
                steps = steps[1:]
            advance = self.advance.forward
            for x in steps:
                states_seq.append(state)
                _, state = advance(*constants, *x, state)
            device = x_seq[0].device
            return tuple(stack_steps(s, device) for s in zip(*states_seq, strict=True)), state

    def all_steps(
        self, x_seq: tuple[Tensor, ...], state_seq: tuple[Tensor, ...], constants: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        """The outputs of all steps from known states, folded in blocks of steps."""
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
        leak: a number; None: the constant of the region.
    """

    cut = True

    def __init__(self, label: str, step: RegionGraph, first: RegionGraph, leak: float | None) -> None:
        super().__init__(label, step, first)
        self.leak = leak

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run all steps: the trace after each step, `[T, *]`, and the final trace."""
        if self.runs_as_operator(constants):
            return super().multi_step(x_seq, state, constants)
        leak = constants[0] if self.leak is None else self.leak
        operand = x_seq[0].detach()
        with torch.no_grad():
            first = update_trace(state[0] if state is not None else 0.0, operand[0], leak)
            if isinstance(leak, Tensor):
                trace = first.new_empty(operand.shape[0], *first.shape)
                leak = leak.to(first)
            else:
                trace = torch.empty_like(operand, dtype=first.dtype)  # in the memory format of the operand
            steps = trace.unbind(0)
            steps[0].copy_(first)
            for t, x in enumerate(operand.unbind(0)[1:]):
                if isinstance(leak, Tensor):
                    torch.addcmul(x, steps[t], leak, out=steps[t + 1])
                else:
                    torch.add(x, steps[t], alpha=leak, out=steps[t + 1])
            return (trace,), (trace[-1].clone(),)
