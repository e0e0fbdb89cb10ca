"""How a call is run, by the shapes of its inputs: how many time steps at once, and what backward computes again.

Plans are made at the first call with inputs of such shapes, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from snnfx.emit.executable import Executable
from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.memory.checkpoint_option import plan_checkpoint, recomputation_applies, refuse_statistics_over_time
from snnfx.memory.chunk_plan import ChunkPlan, plan_chunks
from snnfx.memory.planning import plan_inference, plan_training
from snnfx.sandbox.torch_internals import are_transforms_active, disable_dispatch_modes

__all__ = ["CallPlans"]


State = dict[str, Any]


class CallPlans:
    """The plans of one net.

    Attributes:
        chunks: chunk plans, by the shapes that they are for.
    """

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.chunks: dict[Any, ChunkPlan] = {}
        self._recomputed: dict[Any, RecomputePlan] = {}

    def runner(self, part: str, leaves: Sequence[Tensor], T: int, state: State | None = None) -> Callable[..., Any]:
        """The form of the graph for this call: as it is, or with parts that backward computes again."""
        executable = self.executable
        if recomputation_applies(executable) and not isinstance(executable.options.checkpoint, int):
            plan = self.recompute_plan(T, leaves, state)
            if plan.segments or plan.packs:
                return executable.recomputing_runner(part, plan)
        return executable.graphs.runners[executable.training, part]

    def runner_at_once(self, part: str, leaves: Sequence[Tensor], T: int) -> Callable[..., Any] | None:
        """The form of the graph for all steps of this call; None where there is none, or it is run in chunks."""
        executable = self.executable
        runner = executable.graph_runner(part)
        if runner is None or self.chunk_length(leaves, T) is not None:
            return None
        if not recomputation_applies(executable):
            return runner
        return self.runner(part, leaves, T) if self.checkpoint_length(leaves, T) is None else None

    # -- inference ------------------------------------------------------------------------------------------------

    def chunk_length(self, leaves: Sequence[Tensor], T: int, state: State | None = None) -> int | None:
        """Steps to run at once, None for all `T`: fewer in evaluation mode without gradients, never in a compiler."""
        executable = self.executable
        chunk = executable.options.chunk
        if chunk is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or executable.training:
            return None
        k = chunk if isinstance(chunk, int) else self.chunk_plan(leaves, state).length
        return k if k is not None and k < T else None

    def chunk_plan(self, leaves: Sequence[Tensor], state: State | None) -> ChunkPlan:
        """The plan for inputs (time first) and a first state of these shapes, see `snnfx.memory.planning`."""
        executable = self.executable
        if executable.options.chunk != "auto":
            return plan_chunks(executable.options.chunk)
        # How many steps there are is no matter.
        steps = zip(leaves, executable.varying_inputs, strict=True)
        shapes = tuple([(x.shape[1:] if varies else x.shape, x.dtype) for x, varies in steps])
        key = (shapes, None if state is None else _shapes_of_state(state))
        if key not in self.chunks:
            with _out_of_sight():
                self.chunks[key] = plan_inference(executable, leaves, state)
        return self.chunks[key]

    @property
    def shortest_chunk(self) -> int | None:
        """The fewest time steps run at once in inference so far; None: calls were not chunked."""
        chunk = self.executable.options.chunk
        lengths = [plan.length for plan in self.chunks.values() if plan.length is not None]
        return chunk if isinstance(chunk, int) else min(lengths, default=None)

    # -- training -------------------------------------------------------------------------------------------------

    def checkpoint_length(self, leaves: Sequence[Tensor], T: int, state: State | None = None) -> int | None:
        """Time steps between the checkpoints of the state in training, None for no such checkpoints."""
        if not recomputation_applies(self.executable):
            return None
        k = self.recompute_plan(T, leaves, state).steps
        return k if k is not None and k < T else None

    def recompute_plan(self, T: int, leaves: Sequence[Tensor], state: State | None = None) -> RecomputePlan:
        """What is computed again in the backward pass of T steps of inputs (time first) and a state like these."""
        executable = self.executable
        shapes = tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in leaves)
        learned = tuple(p.requires_grad for p in executable.source.parameters())
        device = leaves[0].device.type if leaves else "cpu"
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (executable.training, T, shapes, learned, autocast, None if state is None else _shapes_of_state(state))
        if key not in self._recomputed:
            with _out_of_sight():
                self._recomputed[key] = self._plan_recomputation(T, leaves, state)
        return self._recomputed[key]

    def _plan_recomputation(self, T: int, leaves: Sequence[Tensor], state: State | None) -> RecomputePlan:
        executable, checkpoint = self.executable, self.executable.options.checkpoint
        if checkpoint is None:
            return RecomputePlan(reason="nothing is computed again, as asked for")
        if isinstance(checkpoint, int):
            refuse_statistics_over_time(executable.program, executable.training, f"checkpoint={checkpoint}")
            return RecomputePlan(steps=checkpoint, reason=f"the state is kept every {checkpoint} steps, as asked for")
        if checkpoint in ("selective", "regions"):
            return plan_checkpoint(executable, checkpoint, T, leaves, state)
        return plan_training(executable, T, leaves, state)


@contextmanager
def _out_of_sight() -> Iterator[None]:
    """What is run here to make a plan is not seen by the caller's modes and hooks, nor changed by them."""
    with ExitStack() as stack:
        stack.enter_context(disable_dispatch_modes())
        if not are_transforms_active():  # which know no hooks
            stack.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _shapes_of_state(state: State) -> tuple[Any, ...]:
    return tuple((name, tuple(v.shape), v.dtype) for name, v in state.items() if isinstance(v, Tensor))
