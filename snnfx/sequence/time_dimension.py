"""Find the dimension of a call's inputs that is time, by traces of calls of other sizes."""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.capture.capture import capture_both_modes, trace_of_call
from snnfx.capture.cold_trace import TracedCall
from snnfx.capture.iteration_tracking import IterationLimit, LoopSource, TooManyIterations
from snnfx.capture.step_arguments import as_call
from snnfx.errors import SnnfxError
from snnfx.ir.program import StepProgram
from snnfx.sandbox.torch_internals import pytree
from snnfx.sequence.counter_reads import may_branch_on_count
from snnfx.sequence.loop_runs import LoopRun, find_loop_runs, scaling_runs
from snnfx.sequence.pointwise_time import TimeDimension
from snnfx.sequence.roles import DependsOnLength

__all__ = ["SHORT", "BothModes", "FoundTime", "TracedCalls"]

SHORT, LONGER = 4, (5, 6, 8)
"""The lengths at which a call is captured: short, but long enough that three iterations follow the first.

The longer one is the first at which the model runs: blocks of 2 or 4 time steps need multiples.
"""
_SLACK = 4
"""A loop that takes T from the inputs iterates at most this many times more than T."""

BothModes = tuple[StepProgram, StepProgram]
"""The captures of a call in training and in evaluation; the same object twice if they do not differ."""


@dataclass(frozen=True)
class FoundTime:
    """The time dimension of the inputs, and the captures of calls with `SHORT` and with `length` time steps."""

    dimension: TimeDimension
    length: int
    short: BothModes
    long: BothModes


class TracedCalls:
    """Traces calls of a model with inputs of several sizes, each only once.

    Args:
        model, example_inputs, entry: as for `capture_calls`.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, entry: str) -> None:
        self.model, self.example_inputs, self.entry = model, example_inputs, entry
        self.tensors = [v for v in pytree.tree_leaves(as_call(example_inputs)) if isinstance(v, Tensor)]
        self._traced: list[_Traced] = []
        """The calls in evaluation mode."""
        self._without_effect: list[tuple[int, list[LoopRun]]] = []
        """Dimensions on which no number of iterations depends, each with the loops of a call of other size."""
        self._ruled_out: set[TimeDimension] = set()

    def capture(self) -> BothModes:
        """Capture the call of the example inputs from the reset state."""
        return self._capture(self.example_inputs, None)

    def find_time(self) -> FoundTime:
        """Find the dimension of the inputs whose size is the number of iterations of a loop.

        Raises:
            DependsOnLength: no size of the inputs is that number, or later iterations may run other code.
        """
        candidates = list(_candidates(self.tensors))
        for index, candidate in enumerate(candidates):
            self._rule_out_images(candidates[index:])
            length = None if candidate in self._ruled_out else self._longer_length(candidate)
            if length is None:
                continue
            short, long = (self._captured(candidate, size) for size in (SHORT, length))
            pairs = short and long and scaling_runs(find_loop_runs(short[0].graph), find_loop_runs(long[0].graph))
            if short and long and pairs:
                for run, _ in pairs:
                    if not run.source.of_module and may_branch_on_count(run.source):
                        raise DependsOnLength(_of_other_iterations(run.source))
                return FoundTime(candidate, length, short, long)
        raise DependsOnLength("no loop takes it from a size of the inputs, as `for t in range(x.shape[0])` does")

    # -- loops --------------------------------------------------------------------------------------------------------

    def _longer_length(self, candidate: TimeDimension) -> int | None:
        """The first length of `LONGER` that the model runs; None if its loops then iterate as often as at `SHORT`."""
        short = self._loops((candidate,), SHORT)
        if not short:
            return None
        if self._differs(candidate):
            for dim, loops in self._without_effect:  # of calls of the original size in this dimension
                if dim != candidate.dim and scaling_runs(short, loops) == []:
                    return None
        for length in LONGER:
            long = self._loops((candidate,), length)
            if long is not None:
                pairs = scaling_runs(short, long)
                if pairs == []:
                    self._without_effect.append((candidate.dim, short))
                return length if pairs else None
        return None

    def _rule_out_images(self, candidates: Sequence[TimeDimension]) -> None:
        """Rule out the two sides of square images by one trace, if the first candidate is one of them.

        Their quotient stays the same, as in a loop over patches of the shorter side.
        """
        first = candidates[0]
        sides = [c for c in candidates if c.leaves == first.leaves and self._size(c) == self._size(first)]
        if first in self._ruled_out or len(sides) < 2 or not self._differs(first):
            return
        for dim, loops in self._without_effect:
            if all(dim != c.dim for c in sides):
                short = self._loops(sides, SHORT)
                if short and scaling_runs(short, loops) == []:
                    self._ruled_out.update(sides)
                return

    def _size(self, candidate: TimeDimension) -> int:
        return self.tensors[candidate.leaves[0]].shape[candidate.dim]

    def _differs(self, candidate: TimeDimension) -> bool:
        """Whether a call of `SHORT` time steps in this dimension has other inputs than the original call."""
        return all(self.tensors[leaf].shape[candidate.dim] != SHORT for leaf in candidate.leaves)

    def _loops(self, candidates: Sequence[TimeDimension], size: int) -> list[LoopRun] | None:
        """The loops of a call, in the first mode that has some; None if the model does not run so."""
        inputs, limit = _resized(self.example_inputs, candidates, size), IterationLimit(size + _SLACK)
        for training in (False, True):
            try:
                traced = trace_of_call(self.model, inputs, self.entry, training, limit)
            except (TooManyIterations, SnnfxError):
                return None
            if not training:
                self._traced.append(_Traced(inputs, traced))
            loops = find_loop_runs(traced.graph)
            if loops:
                break
        return loops

    # -- captures -----------------------------------------------------------------------------------------------------

    def _captured(self, time: TimeDimension, size: int) -> BothModes | None:
        """Capture a call of `size` time steps; None if the model does not run so."""
        try:
            return self._capture(_resized(self.example_inputs, (time,), size), size + _SLACK)
        except (TooManyIterations, SnnfxError):
            return None

    def _capture(self, inputs: Any, most_iterations: int | None) -> BothModes:
        """Capture a call that starts from the reset state, in both modes.

        If a call from another state runs other code (as where the forward resets the neurons itself), this is the code
        of the first call.
        """
        known = next((t for t in self._traced if _are_alike(t.inputs, inputs)), None)
        if known is not None:
            self._traced.remove(known)  # the passes change its graph
        training, evaluation = capture_both_modes(
            self.model,
            inputs,
            self.entry,
            iterations=IterationLimit(most_iterations),
            traced=None if known is None else known.call,
        )
        first = _first_call(training)
        return first, first if evaluation is training else _first_call(evaluation)


@dataclass(frozen=True, eq=False)
class _Traced:
    inputs: Any
    call: TracedCall = field(repr=False)


def _of_other_iterations(source: LoopSource) -> str:
    """Why a loop keeps its length although its first iterations run the same step."""
    if not linecache.getlines(source.filename):
        return "the source of the loop cannot be read, and other iterations may run other code"
    return "other iterations of the loop may run other code, since they read a counter or a list"


def _first_call(program: StepProgram) -> StepProgram:
    first = program.first_step
    if first is None:
        return program
    return replace(
        first,
        guards=program.guards,
        setting_reads=program.setting_reads,
        initial_attributes=program.initial_attributes,
    )


def _candidates(tensors: list[Tensor]) -> Iterator[TimeDimension]:
    """The dimensions that may be time, the most usual ones first (0, 1, the last one); inputs of one size share it."""
    seen: set[TimeDimension] = set()
    most = max((t.dim() for t in tensors), default=0)
    for dim in sorted(range(most), key=lambda d: (d > 1 and d != most - 1, d)):
        for first, tensor in enumerate(tensors):
            if tensor.dim() <= dim:
                continue
            same = tuple(i for i, t in enumerate(tensors) if t.dim() > dim and t.shape[dim] == tensor.shape[dim])
            for leaves in (same, (first,)):
                candidate = TimeDimension(leaves, dim)
                if candidate not in seen:
                    seen.add(candidate)
                    yield candidate


def _resized(example_inputs: Any, dimensions: Sequence[TimeDimension], size: int) -> Any:
    """The example inputs with another size of some dimensions."""
    flat, spec = pytree.tree_flatten(example_inputs)
    tensors = [i for i, v in enumerate(flat) if isinstance(v, Tensor)]
    shapes: dict[int, list[int]] = {}
    for dimension in dimensions:
        for leaf in dimension.leaves:
            shapes.setdefault(tensors[leaf], list(flat[tensors[leaf]].shape))[dimension.dim] = size
    for i, shape in shapes.items():
        flat[i] = torch.zeros(shape, dtype=flat[i].dtype, device=flat[i].device)
    return pytree.tree_unflatten(flat, spec)


def _are_alike(a: Any, b: Any) -> bool:
    """Whether a capture cannot tell two calls apart: it sees no values of tensors."""
    flat_a, spec_a = pytree.tree_flatten(a)
    flat_b, spec_b = pytree.tree_flatten(b)
    return spec_a == spec_b and all(v is w or _is_same_kind(v, w) for v, w in zip(flat_a, flat_b, strict=True))


def _is_same_kind(a: Any, b: Any) -> bool:
    return all(type(v) is Tensor and v.layout is torch.strided for v in (a, b)) and _kind_of(a) == _kind_of(b)


def _kind_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg()
