"""A loop with a generated kernel, on tensors without data: what it allocates, and nothing of what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.ops.sequence_functions import stack_steps
from snnfx.regions.region_modules import LoopRegion, tensors_of
from snnfx.sandbox.torch_internals import disable_dispatch_modes

__all__ = ["KernelStandIn"]


class KernelStandIn:
    """Has the outputs and final states of a loop, and keeps for backward what its kernel saves.

    Args:
        region: with a kernel.
        known: steps that were run, kept by what they depend on.
        naming: says who makes what, see `snnfx.memory.tensor_names`; None: nobody asks.
        named: what it is called there.
        slots: of its states.
    """

    def __init__(
        self,
        region: LoopRegion,
        known: dict[Any, Any],
        naming: Any = None,
        named: str = "",
        slots: Sequence[str] = (),
    ) -> None:
        self.region, self.known = region, known
        self.naming, self.named, self.slots = naming, named, slots

    def __call__(self, *arguments: Any) -> Any:
        return self.region(*arguments)

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """`(outputs [T, *], final state)`."""
        y, after = self._step(x_seq, state, constants)
        saved, kept = _saved_by_kernel(self.region) if torch.is_grad_enabled() else (0, ())
        count, T = len(y), x_seq[0].shape[0]
        given = [*x_seq, *tensors_of(constants), *(s for s in state or () if isinstance(s, Tensor))]
        found = _StandInFunction.apply(self, T, [*y, *after], count, saved, kept, *given)
        rest = iter(found)
        results = [next(rest) if isinstance(v, Tensor) else v for v in (*y, *after)]
        # A number at each step, such as a count, is a sequence as well.
        device = x_seq[0].device
        outputs = [v if isinstance(v, Tensor) else stack_steps([v] * T, device) for v in results[:count]]
        return tuple(outputs), tuple(results[count:])

    def _step(
        self, x_seq: Sequence[Tensor], state: Any, constants: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Outputs and states of one step, run once for inputs of these shapes."""
        shapes = tuple((tuple(x.shape[1:]), x.dtype) for x in x_seq)
        given = None if state is None else tuple(_form(s) for s in state)
        key = (self.region, shapes, given)
        if key not in self.known:
            with disable_dispatch_modes(), torch.no_grad():
                first = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
                self.known[key] = self.region(*constants, *first, state)
        return self.known[key]  # type: ignore[no-any-return]

    def name(self, what: str) -> None:
        """Say what is made now."""
        if self.naming is not None:
            self.naming.current = what


class _StandInFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: KernelStandIn,
        T: int,
        step: list[Any],
        outputs: int,
        saved: int,
        kept: tuple[int, ...],
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        like = given[0]
        results = []
        for i, v in enumerate(step):
            if isinstance(v, Tensor):
                kernel.name(
                    f"state {kernel.slots[i - outputs]}" if 0 <= i - outputs < len(kernel.slots) else kernel.named
                )
                results.append(
                    _empty(like, (T, *v.shape), v.dtype)
                    if i < outputs
                    else torch.empty(tuple(v.shape), dtype=v.dtype, device="meta")
                )
        ctx.shapes = [(x.shape, x.stride(), x.dtype) for x in given]
        ctx.mark_non_differentiable(*(y for y in results if not y.is_floating_point()))
        largest = max(results, key=lambda y: y.numel() * y.element_size(), default=like)
        kernel.name(f"{kernel.named}: saved by its kernel")
        own = [_empty(largest, largest.shape, largest.dtype) for _ in range(saved if any(ctx.needs_input_grad) else 0)]
        kernel.name(kernel.named)
        ctx.save_for_backward(*own, *(given[i] for i in kept))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[6:]
        found = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta") if need else None
            for (shape, stride, dtype), need in zip(ctx.shapes, wanted, strict=True)
        ]
        return (None, None, None, None, None, None, *found)


def _form(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """In the memory format of the input."""
    if tuple(shape) == tuple(like.shape):
        return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _saved_by_kernel(region: LoopRegion) -> tuple[int, tuple[int, ...]]:
    """Sequences that its kernel saves, and inputs that it keeps; before the first call: one, as for most neurons."""
    assert region.kernels is not None
    for entry in region.kernels.entries.values():
        for needs in entry.built:
            if needs is not None and isinstance(entry.lowered, MixedStep):
                kept = entry.lowered.training(needs).plan
                return len(kept.values) + len(kept.states), tuple(kept.inputs)
            if needs is not None and entry.lowered is not None:
                plan = entry.lowered.training(needs).plan
                return len(plan.saved), tuple(plan.inputs)
    return 1, ()
