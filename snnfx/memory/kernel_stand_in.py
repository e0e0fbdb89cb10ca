"""Stand-in for a loop with a generated kernel on meta tensors: allocates like the kernel, computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.ops.sequence_functions import stack_steps
from snnfx.regions.region_modules import LoopRegion
from snnfx.regions.sequence_region import tensors_of
from snnfx.sandbox.torch_internals import disable_dispatch_modes

__all__ = ["KernelStandIn"]


class KernelStandIn:
    """Returns tensors like a loop, and saves the same bytes for backward as its kernel.

    Args:
        region: a loop with a kernel.
        step_cache: results of one step, by region and input shapes.
        naming: names tensors, see `snnfx.memory.tensor_names`; None: no names.
        label: the name of the loop for `naming`.
        slots: the names of its states.
    """

    def __init__(
        self,
        region: LoopRegion,
        step_cache: dict[Any, Any],
        naming: Any = None,
        label: str = "",
        slots: Sequence[str] = (),
    ) -> None:
        self.region, self.step_cache = region, step_cache
        self.naming, self.label, self.slots = naming, label, slots

    def __call__(self, *arguments: Any) -> Any:
        return self.region(*arguments)

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """`(outputs [T, *], final state)`."""
        y, after = self._step(x_seq, state, constants)
        saved, saved_inputs = _saved_by_kernel(self.region) if torch.is_grad_enabled() else (0, ())
        count, T = len(y), x_seq[0].shape[0]
        inputs = [*x_seq, *tensors_of(constants), *(s for s in state or () if isinstance(s, Tensor))]
        tensors = iter(_StandInFunction.apply(self, T, [*y, *after], count, saved, saved_inputs, *inputs))
        results = [next(tensors) if isinstance(v, Tensor) else v for v in (*y, *after)]
        # An output that is a number at each step, such as a count, becomes a sequence too.
        device = x_seq[0].device
        outputs = [v if isinstance(v, Tensor) else stack_steps([v] * T, device) for v in results[:count]]
        return tuple(outputs), tuple(results[count:])

    def _step(
        self, x_seq: Sequence[Tensor], state: Any, constants: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Outputs and states of one step, run once per combination of input shapes."""
        shapes = tuple((tuple(x.shape[1:]), x.dtype) for x in x_seq)
        state_shapes = None if state is None else tuple(_shape_of(s) for s in state)
        key = (self.region, shapes, state_shapes)
        if key not in self.step_cache:
            with disable_dispatch_modes(), torch.no_grad():
                first = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
                self.step_cache[key] = self.region(*constants, *first, state)
        return self.step_cache[key]  # type: ignore[no-any-return]

    def name(self, what: str) -> None:
        """Set the name of the tensors that are made next."""
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
        saved_inputs: tuple[int, ...],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        like = inputs[0]
        results = []
        for i, v in enumerate(step):
            if isinstance(v, Tensor):
                kernel.name(
                    f"state {kernel.slots[i - outputs]}" if 0 <= i - outputs < len(kernel.slots) else kernel.label
                )
                results.append(
                    _empty(like, (T, *v.shape), v.dtype)
                    if i < outputs
                    else torch.empty(tuple(v.shape), dtype=v.dtype, device="meta")
                )
        ctx.shapes = [(x.shape, x.stride(), x.dtype) for x in inputs]
        ctx.mark_non_differentiable(*(y for y in results if not y.is_floating_point()))
        largest = max(results, key=lambda y: y.numel() * y.element_size(), default=like)
        kernel.name(f"{kernel.label}: saved by its kernel")
        saved_tensors = [
            _empty(largest, largest.shape, largest.dtype) for _ in range(saved if any(ctx.needs_input_grad) else 0)
        ]
        kernel.name(kernel.label)
        ctx.save_for_backward(*saved_tensors, *(inputs[i] for i in saved_inputs))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[6:]
        grads_of_inputs = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta") if need else None
            for (shape, stride, dtype), need in zip(ctx.shapes, needed, strict=True)
        ]
        return (None, None, None, None, None, None, *grads_of_inputs)


def _shape_of(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty meta tensor, in the strides of `like` if the shapes agree."""
    if tuple(shape) == tuple(like.shape):
        return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _saved_by_kernel(region: LoopRegion) -> tuple[int, tuple[int, ...]]:
    """Number of sequences that a kernel saves, and saved inputs; before the first call one, as for most neurons."""
    assert region.kernels is not None
    for entry in region.kernels.entries.values():
        for needs in entry.built:
            if needs is not None and isinstance(entry.lowered, MixedStep):
                loop_plan = entry.lowered.training(needs).plan
                return len(loop_plan.values) + len(loop_plan.states), tuple(loop_plan.inputs)
            if needs is not None and entry.lowered is not None:
                plan = entry.lowered.training(needs).plan
                return len(plan.saved), tuple(plan.inputs)
    return 1, ()
