"""Chunk plans and recompute plans of calls, cached by the shapes of the inputs.

A plan is made at the first call with inputs of these shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from snnfx.emit.bounded_cache import BoundedCache
from snnfx.emit.executable import Executable
from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.memory.checkpoint_option import (
    plan_checkpoint,
    recomputation_applies,
    refuse_changed_parameters,
    refuse_statistics_over_time,
)
from snnfx.memory.chunk_plan import ChunkPlan, plan_chunks
from snnfx.memory.planning import plan_inference, plan_training
from snnfx.sandbox.torch_internals import are_transforms_active, disable_dispatch_modes

__all__ = ["CallPlans"]


State = dict[str, Any]

MOST_PLANS = 64
"""Largest number of plans of one kind; a recompute plan depends on T."""


class CallPlans:
    """The plans for the calls of one executable."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self._chunk_plans: BoundedCache[ChunkPlan] = BoundedCache(MOST_PLANS)
        self._recompute_plans: BoundedCache[RecomputePlan] = BoundedCache(MOST_PLANS)

    def runner(self, part: str, leaves: Sequence[Tensor], T: int, state: State | None = None) -> Callable[..., Any]:
        """The function that runs a graph for this call, with recomputation if the plan of the call asks for it."""
        executable = self.executable
        if recomputation_applies(executable) and not isinstance(executable.options.checkpoint, int):
            plan = self.recompute_plan(T, leaves, state)
            if plan.segments or plan.packs:
                return executable.recomputing_runner(part, plan)
        return executable.graphs.runners[executable.training, part]

    def runner_at_once(self, part: str, leaves: Sequence[Tensor], T: int) -> Callable[..., Any] | None:
        """The function that runs all time steps of this call at once; None if it is chunked or has no such graph."""
        executable = self.executable
        runner = executable.graph_runner(part)
        if runner is None or self.chunk_length(leaves, T) is not None:
            return None
        if not recomputation_applies(executable):
            return runner
        return self.runner(part, leaves, T) if self.checkpoint_length(leaves, T) is None else None

    def chunk_length(self, leaves: Sequence[Tensor], T: int, state: State | None = None) -> int | None:
        """Time steps to run at once; None: all `T`.

        Only calls in evaluation mode without gradients are chunked, and none under torch.compile.
        """
        executable = self.executable
        chunk = executable.options.chunk
        if chunk is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or executable.training:
            return None
        k = chunk if isinstance(chunk, int) else self.chunk_plan(leaves, state).length
        return k if k is not None and k < T else None

    def chunk_plan(self, leaves: Sequence[Tensor], state: State | None) -> ChunkPlan:
        """The chunk plan for inputs (time first) and a first state of these shapes."""
        executable = self.executable
        if executable.options.chunk != "auto":
            return plan_chunks(executable.options.chunk)
        # The plan does not depend on T.
        pairs = zip(leaves, executable.varying_inputs, strict=True)
        shapes = tuple([(x.shape[1:] if varies else x.shape, x.dtype) for x, varies in pairs])
        key = (shapes, None if state is None else _shapes_of_state(state))
        return self._chunk_plans.get_or_make(key, partial(self._plan_inference, leaves, state))

    def _plan_inference(self, leaves: Sequence[Tensor], state: State | None) -> ChunkPlan:
        with _hidden_from_caller():
            return plan_inference(self.executable, leaves, state)

    @property
    def shortest_chunk(self) -> int | None:
        """The fewest time steps run at once in inference so far; None: calls were not chunked."""
        chunk = self.executable.options.chunk
        lengths = [plan.length for plan in self._chunk_plans.values() if plan.length is not None]
        return chunk if isinstance(chunk, int) else min(lengths, default=None)

    def checkpoint_length(self, leaves: Sequence[Tensor], T: int, state: State | None = None) -> int | None:
        """Time steps between checkpoints of the state in training; None: no checkpoints over time."""
        if not recomputation_applies(self.executable):
            return None
        k = self.recompute_plan(T, leaves, state).steps
        return k if k is not None and k < T else None

    def recompute_plan(self, T: int, leaves: Sequence[Tensor], state: State | None = None) -> RecomputePlan:
        """The recompute plan for T time steps of inputs (time first) and a first state of these shapes."""
        executable = self.executable
        shapes = tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in leaves)
        trainable = tuple(p.requires_grad for p in executable.source.parameters())
        device = leaves[0].device.type if leaves else "cpu"
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (executable.training, T, shapes, trainable, autocast, None if state is None else _shapes_of_state(state))
        return self._recompute_plans.get_or_make(key, partial(self._make_recompute_plan, T, leaves, state))

    def _make_recompute_plan(self, T: int, leaves: Sequence[Tensor], state: State | None) -> RecomputePlan:
        executable, checkpoint = self.executable, self.executable.options.checkpoint
        if checkpoint is None:
            return RecomputePlan(reason="nothing is recomputed (checkpoint=None)")
        if isinstance(checkpoint, int):
            refuse_statistics_over_time(executable.program, executable.training, f"checkpoint={checkpoint}")
            refuse_changed_parameters(executable.program, f"checkpoint={checkpoint}")
            return RecomputePlan(
                steps=checkpoint, reason=f"the state is saved every {checkpoint} time steps (checkpoint={checkpoint})"
            )
        with _hidden_from_caller():
            if checkpoint in ("selective", "regions"):
                return plan_checkpoint(executable, checkpoint, T, leaves, state)
            return plan_training(executable, T, leaves, state)


@contextmanager
def _hidden_from_caller() -> Iterator[None]:
    """Hide planning from the caller's dispatch modes and saved-tensor hooks."""
    with ExitStack() as stack:
        stack.enter_context(disable_dispatch_modes())
        if not are_transforms_active():  # torch.func transforms do not support saved-tensor hooks
            stack.enter_context(saved_tensors_hooks(_identity, _identity))
        yield


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _shapes_of_state(state: State) -> tuple[Any, ...]:
    return tuple((name, tuple(v.shape), v.dtype) for name, v in state.items() if isinstance(v, Tensor))
