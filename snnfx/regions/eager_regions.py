"""Eager execution of loop and map regions: kernels, Python loop, torch.vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import warn_once
from snnfx.ir.program import SELF_TARGET
from snnfx.ops.operator_lookup import traits_of
from snnfx.ops.sequence_functions import stack_steps, unbind_steps
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.sequence_region import RegionGraph, SequenceRegion, buffers_of
from snnfx.sandbox.internal_faults import is_internal_fault
from snnfx.sandbox.tensor_values import restore_value
from snnfx.state.step_calls import call_opaque

__all__ = ["EagerLoop", "EagerMap"]


class EagerLoop(SequenceRegion):
    """A strongly connected component, stepped over time.

    Args:
        label: qualified name for messages.
        step: `(*constants, *inputs, state) -> (outputs, state)`.
        first: `(*constants, *inputs) -> (outputs, state)`: the step from the reset state, None without state.

    Attributes:
        make_start: makes the graph `(*constants, *inputs) -> (states before the first step, states after it)`, from
            the reset state; None without state.
        norms_in_kernel: the BatchNorms of the folds before the loop that its kernel computes in training.
    """

    def __init__(self, label: str, step: RegionGraph, first: RegionGraph | None) -> None:
        super().__init__(label, step)
        self.first = first
        self.make_start: Callable[[], RegionGraph] | None = None
        self.kernels: RegionKernels | None = None
        self.norms_in_kernel: list[nn.Module] = []
        self.may_return_structures = any(
            node.target is call_opaque and getattr(node.args[0], "target", None) == SELF_TARGET
            for node in step.graph.nodes
        )
        """Only of the whole model: code behind a module may have asked for the type of its result during capture."""

    def forward(self, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run one step, `(*constants, *inputs, state)`; state None means the reset state."""
        *rest, state = arguments
        if state is None and self.first is not None:
            return self.first.forward(*rest)  # type: ignore[no-any-return]
        return self.step.forward(*rest, state)  # type: ignore[no-any-return]

    def loop_eagerly(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run the kernel of the region or, without one, the steps in a Python loop: `(outputs [T, *], state)`."""
        results = None if self.kernels is None else self.kernels.run(x_seq, state, constants, self.steps_to_measure)
        return self._step_by_step(x_seq, state, constants) if results is None else results

    def steps_to_measure(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run the steps in a Python loop as calls do that were measured to be faster so."""
        return self._step_by_step(x_seq, state, constants)

    def _step_by_step(
        self,
        x_seq: Sequence[Tensor],
        state: Sequence[Any] | None,
        constants: Sequence[Any],
        first: Callable[..., Any] | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Run the steps in a Python loop; `first` runs the first one from the reset state."""
        outputs: list[tuple[Tensor, ...]] = []
        step = self.step.forward  # not step(...): module calls and their wrappers cost more than a small step
        for x in zip(*(unbind_steps(x) for x in x_seq), strict=True):
            if state is not None:
                y, state = step(*constants, *x, state)
            else:
                y, state = self.forward(*constants, *x, None) if first is None else first(*constants, *x)
            outputs.append(y)
        device, structures = x_seq[0].device, self.may_return_structures
        return tuple(stack_steps(y, device, structures) for y in zip(*outputs, strict=True)), state  # type: ignore[return-value]


class EagerMap(SequenceRegion):
    """A region that is parallel in time but not foldable: torch.vmap over T.

    Element-wise operations need no vmap: with as many dimensions for each input, they broadcast over T as over the
    dimensions of a step. Where vmap has no batching rule for an operation, the steps run one by one, with one warning.
    """

    def __init__(self, label: str, step: RegionGraph) -> None:
        super().__init__(label, step)
        self.refused_by_vmap = ""
        self._is_elementwise = _is_elementwise(step)

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Run one step, `(*constants, *inputs)`."""
        return self.step.forward(*arguments)  # type: ignore[no-any-return]

    def map_eagerly(self, x_seq: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run all steps under torch.vmap, or one by one once vmap has refused: outputs `[T, *]`."""
        if self.refused_by_vmap:
            return self._one_by_one(x_seq, constants)
        if self._is_elementwise and _broadcast_over_time(x_seq, constants):
            results = self.step.forward(*constants, *x_seq)
            if all(isinstance(y, Tensor) and y.dim() == x_seq[0].dim() for y in results):
                return results  # type: ignore[no-any-return]
        buffers = [(buffer, buffer.clone()) for buffer in buffers_of(constants)]
        try:
            return torch.vmap(lambda *x: self.step.forward(*constants, *x), randomness="different")(*x_seq)  # type: ignore[no-any-return]
        except Exception as error:  # a batching rule may raise anything, e.g. an IndexError for `flip` of a scalar
            if is_internal_fault(error):
                raise
            for buffer, value in buffers:
                # BatchNorm counts its batch before vmap finds no batching rule for it.
                restore_value(buffer, value)
            results = self._one_by_one(x_seq, constants)  # raises if the model itself is at fault
            self.refused_by_vmap = str(error).splitlines()[0]
            warn_once(
                "SNNFX504",
                f"torch.vmap refused the region {self.label} ({self.refused_by_vmap}); its steps run one by one.",
                key=self.handle,
            )
            return results

    def _one_by_one(self, x_seq: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Tensor, ...]:
        steps = [self.step.forward(*constants, *x) for x in zip(*(x.unbind(0) for x in x_seq), strict=True)]
        return tuple(stack_steps(y, x_seq[0].device) for y in zip(*steps, strict=True))


def _is_elementwise(step: RegionGraph) -> bool:
    """Whether all operations are element-wise and none draws random numbers."""
    for node in step.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        traits = traits_of(node)
        if not traits.elementwise or traits.random or traits.creates or traits.view or node.kwargs.get("out"):
            return False
    return True


def _broadcast_over_time(x_seq: Sequence[Tensor], constants: Sequence[Any]) -> bool:
    """Whether T is in the same dimension of all inputs, and no constant has as many dimensions."""
    dims = x_seq[0].dim()
    return (
        dims > 1
        and all(x.dim() == dims for x in x_seq)
        and all(isinstance(c, Tensor) and c.dim() < dims for c in constants)
    )
