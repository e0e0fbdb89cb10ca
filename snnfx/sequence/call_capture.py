"""Capture whole calls of a model that runs over time itself, at two lengths if it takes T from its inputs."""

from __future__ import annotations

import itertools
import linecache
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.capture.capture import capture_both_modes, trace_of_call
from snnfx.capture.iteration_tracking import IterationLimit, LoopSource, TooManyIterations
from snnfx.capture.step_arguments import as_call
from snnfx.errors import CaptureError, SnnfxError
from snnfx.ir.history import History, PassRecord
from snnfx.ir.pass_manager import PassManager, print_record, run_rewrite
from snnfx.ir.program import StepProgram
from snnfx.ir.program_snapshot import ProgramSnapshot
from snnfx.passes import Normalize, RemoveDeadCode
from snnfx.sandbox.torch_internals import pytree
from snnfx.sequence.counter_reads import may_branch_on_count
from snnfx.sequence.element_lists import join_elements
from snnfx.sequence.lengths import Lengths, make_length_variable, require_same_step
from snnfx.sequence.loop_kinds import runs_neurons
from snnfx.sequence.loop_runs import LoopRun, find_loop_runs, move_attributes_first, scaling_runs, share_equal_constants
from snnfx.sequence.pointwise_time import TimeDimension
from snnfx.sequence.reroll import RolledLoop
from snnfx.sequence.roles import DependsOnLength, Differs
from snnfx.sequence.rolling import note_of_loops, parts_of_loop, refusal_of_loop, roll_all_loops, roll_loop
from snnfx.sequence.size_checks import move_size_checks_first
from snnfx.sequence.written_elements import forward_written_elements

__all__ = ["CapturedCall", "capture_calls", "roll_fixed_loops"]

SHORT, LONGER = 4, (5, 6, 8)
"""The lengths at which a call is captured: short, but long enough that three iterations follow the first.

The longer one is the first at which the model runs: blocks of 2 or 4 time steps need multiples.
"""
_SLACK = 4
"""A loop that takes T from the inputs iterates at most this many times more than T."""


@dataclass
class CapturedCall:
    """A whole call of a model, with its loops re-rolled.

    Args:
        program: the call; `run_loop` nodes refer to the loops.
        loops: the loops, in execution order.
        fixed_length: why the number of time steps is fixed; "" if it is not.
        time: the time dimension of the inputs; None if the number of time steps is fixed.
    """

    program: StepProgram
    loops: list[RolledLoop]
    fixed_length: str = ""
    time: TimeDimension | None = None


def capture_calls(
    model: nn.Module, example_inputs: Any, entry: str, history: History
) -> tuple[CapturedCall, CapturedCall]:
    """Capture a whole call in both modes: `(training, evaluation)`, the same object twice if they do not differ.

    Args:
        model: a model whose forward runs over time itself.
        example_inputs: the inputs of one call, whole sequences.
        entry: the method.
        history: gets the records of the capture in training mode, and of the passes that re-roll its loops.

    Raises:
        CaptureError: the model cannot be captured, or SNNFX230, the iterations of a loop differ.
    """
    start = time.perf_counter()
    # A net stores the loops of both modes together.
    names = (f"snnfx_loop_{index}" for index in itertools.count())
    try:
        dimension, length, short, long = _find_time_dimension(model, example_inputs, entry)
        records = History()
        _record_capture(short[0], f"capture{{time_steps={SHORT}}}", start, records)
        of_training = _of_any_length(short[0], long[0], dimension, length, records, names)
        of_evaluation = of_training
        if short[1] is not short[0]:
            of_evaluation = _of_any_length(short[1], long[1], dimension, length, History(), names)
    except DependsOnLength as dependence:
        why_fixed = f"{dependence.why} ({dependence.location})" if dependence.location else dependence.why
    else:
        history += records
        return of_training, of_evaluation
    training, evaluation = _capture_from_reset_state(model, example_inputs, entry)
    _record_capture(training, "capture", start, history)
    first = _with_loops(training, why_fixed, history, names)
    return first, first if evaluation is training else _with_loops(evaluation, why_fixed, History(), names)


def _record_capture(program: StepProgram, description: str, start: float, history: History) -> None:
    milliseconds = (time.perf_counter() - start) * 1e3
    note = f"{len(program.graph.nodes)} nodes in a whole call"
    mode = program.training
    history.append(
        PassRecord(description, milliseconds, note, str(program), "", "captured", mode, ProgramSnapshot(program))
    )
    print_record(history[-1])


_BothModes = tuple[StepProgram, StepProgram]


def _capture_from_reset_state(
    model: nn.Module, example_inputs: Any, entry: str, most_iterations: int | None = None
) -> _BothModes:
    """Capture a call that starts from the reset state, in both modes.

    If a call from another state runs other code (as where the forward resets the neurons itself), this is the code of
    the first call.
    """
    training, evaluation = capture_both_modes(model, example_inputs, entry, iterations=IterationLimit(most_iterations))
    first = _first_call(training)
    return first, first if evaluation is training else _first_call(evaluation)


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


# -- the time dimension -----------------------------------------------------------------------------------------------


def _find_time_dimension(
    model: nn.Module, example_inputs: Any, entry: str
) -> tuple[TimeDimension, int, _BothModes, _BothModes]:
    """Find the dimension of the inputs whose size is the number of iterations of a loop.

    Returns:
        `(dimension, longer length, captures of the shorter call, captures of the longer call)`.

    Raises:
        DependsOnLength: there is no such dimension, or later iterations may run other code.
    """
    tensors = [v for v in pytree.tree_leaves(as_call(example_inputs)) if isinstance(v, Tensor)]
    probes = _Probes(model, example_inputs, entry)
    for candidate in _candidates(tensors):
        length = probes.longer_length(candidate, tensors)
        if length is None:
            continue
        short, long = (_captured(model, example_inputs, candidate, size, entry) for size in (SHORT, length))
        pairs = short and long and scaling_runs(find_loop_runs(short[0].graph), find_loop_runs(long[0].graph))
        if short and long and pairs:
            for run, _ in pairs:
                if not run.source.of_module and may_branch_on_count(run.source):
                    raise DependsOnLength(_of_other_iterations(run.source))
            return candidate, length, short, long
    raise DependsOnLength(_NO_LENGTH)


def _of_other_iterations(source: LoopSource) -> str:
    """Why a loop keeps its length although its first iterations run the same step."""
    if not linecache.getlines(source.filename):
        return "the source of the loop cannot be read, and other iterations may run other code"
    return "other iterations of the loop may run other code, since they read a counter or a list"


class _Probes:
    """Finds the dimensions that decide how often loops iterate, by single traces of calls with other sizes.

    Args:
        model, example_inputs, entry: as for `capture_calls`.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, entry: str) -> None:
        self.model, self.example_inputs, self.entry = model, example_inputs, entry
        self._without_effect: list[tuple[int, list[LoopRun]]] = []
        """Dimensions on which no number of iterations depends, each with the loops of a call of other size."""

    def longer_length(self, candidate: TimeDimension, tensors: Sequence[Tensor]) -> int | None:
        """The first length of `LONGER` that the model runs; None if its loops then iterate as often as at `SHORT`."""
        short = self._loops(candidate, SHORT)
        if not short:
            return None
        if all(tensors[leaf].shape[candidate.dim] != SHORT for leaf in candidate.leaves):
            for dim, loops in self._without_effect:  # of calls of the original size in this dimension
                if dim != candidate.dim and scaling_runs(short, loops) == []:
                    return None
        for length in LONGER:
            long = self._loops(candidate, length)
            if long is not None:
                pairs = scaling_runs(short, long)
                if pairs == []:
                    self._without_effect.append((candidate.dim, short))
                return length if pairs else None
        return None

    def _loops(self, candidate: TimeDimension, size: int) -> list[LoopRun] | None:
        """The loops of a call, in the first mode that has some; None if the model does not run so."""
        inputs, limit = _resized(self.example_inputs, candidate, size), IterationLimit(size + _SLACK)
        for training in (False, True):
            try:
                graph = trace_of_call(self.model, inputs, self.entry, training, limit)
            except (TooManyIterations, SnnfxError):
                return None
            loops = find_loop_runs(graph)
            if loops:
                break
        return loops


def _captured(model: nn.Module, inputs: Any, time: TimeDimension, size: int, entry: str) -> _BothModes | None:
    """Capture a call of `size` time steps; None if the model does not run so."""
    try:
        return _capture_from_reset_state(model, _resized(inputs, time, size), entry, size + _SLACK)
    except (TooManyIterations, SnnfxError):
        return None


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


def _resized(example_inputs: Any, time: TimeDimension, size: int) -> Any:
    """The example inputs with another number of time steps."""
    flat, spec = pytree.tree_flatten(example_inputs)
    tensors = [i for i, v in enumerate(flat) if isinstance(v, Tensor)]
    for leaf in time.leaves:
        value = flat[tensors[leaf]]
        shape = list(value.shape)
        shape[time.dim] = size
        flat[tensors[leaf]] = torch.zeros(shape, dtype=value.dtype, device=value.device)
    return pytree.tree_unflatten(flat, spec)


# -- re-rolling -------------------------------------------------------------------------------------------------------


def _of_any_length(
    short: StepProgram,
    long: StepProgram,
    dimension: TimeDimension,
    length: int,
    history: History,
    names: Iterator[str],
) -> CapturedCall:
    """Re-roll the loops of two calls, and make the number of time steps variable."""
    loops: list[RolledLoop] = []

    def reroll_loops() -> str:
        pairs = scaling_runs(find_loop_runs(short.graph), find_loop_runs(long.graph))
        if pairs is None:
            raise CaptureError("SNNFX230", "the loops that run depend on the number of time steps")
        for run_short, run_long in pairs:
            parts_short, parts_long = (
                parts_of_loop(short, run_short, any_length=True),
                parts_of_loop(long, run_long, any_length=True),
            )
            if len(parts_short) != len(parts_long):
                raise refusal_of_loop(
                    run_short, Differs("its number of time steps decides which operations it runs", None)
                )
            for part_short, part_long, target in zip(parts_short, parts_long, names, strict=False):
                parts = ((short, part_short), (long, part_long))
                a, b = (roll_loop(program, part, target, any_length=True) for program, part in parts)
                try:
                    require_same_step(a.program, b.program)
                except DependsOnLength:
                    raise
                except Differs as difference:
                    raise refusal_of_loop(run_short, difference) from difference
                loops.append(a)
        return note_of_loops(loops)

    def free_length() -> str:
        try:
            make_length_variable(short, long, Lengths(SHORT, length, dimension.leaves[0], dimension.dim))
        except Differs as difference:
            why = f"the code around the loops depends on it: {difference.why}"
            raise DependsOnLength(why, difference.node) from difference
        return f"compared with the call of {length} time steps"

    _prepare(long, History())
    _prepare(short, history)
    run_rewrite("reroll_loops", short, reroll_loops, history)
    _finish(long, History())
    _finish(short, history)
    run_rewrite("make_length_variable", short, free_length, history)
    return CapturedCall(short, loops, time=replace(dimension, size=SHORT))


_NO_LENGTH = "no loop takes it from a size of the inputs, as `for t in range(x.shape[0])` does"


def _with_loops(program: StepProgram, why_fixed: str, history: History, names: Iterator[str]) -> CapturedCall:
    """Re-roll the loops of one call, whose number of iterations is fixed."""
    loops: list[RolledLoop] = []
    unrolled: list[str] = []

    def reroll_loops() -> str:
        rolled = roll_all_loops(program, names)
        loops.extend(rolled.loops)
        unrolled.extend(rolled.unrolled)
        if not rolled.loops and rolled.refusals:
            raise rolled.refusals[0]
        return note_of_loops(loops)

    _prepare(program, history)
    run_rewrite("reroll_loops", program, reroll_loops, history)
    _finish(program, history)
    return CapturedCall(program, loops, "; ".join([f"the number of time steps is fixed: {why_fixed}", *unrolled]))


def _prepare(program: StepProgram, history: History) -> None:
    """Make the operations functional, and move reads of attributes in front of all loops."""
    PassManager([Normalize()]).run(program, history)
    run_rewrite("move_attributes_first", program, lambda: move_attributes_first(program), history)
    run_rewrite("move_size_checks_first", program, lambda: move_size_checks_first(program), history)
    run_rewrite("forward_written_elements", program, lambda: forward_written_elements(program), history)
    run_rewrite("share_equal_constants", program, lambda: share_equal_constants(program), history)


def _finish(program: StepProgram, history: History) -> None:
    """Join the elements that the code around the loops takes from their sequences."""
    run_rewrite("join_elements", program, lambda: join_elements(program), history)
    PassManager([RemoveDeadCode()]).run(program, history)


def roll_fixed_loops(calls: tuple[CapturedCall, CapturedCall], history: History) -> None:
    """Re-roll the loops of fixed length in calls of any length, which have no step form.

    Args:
        calls: the calls in training and evaluation, which are changed; those of fixed length stay.
        history: gets the records of the call in training.
    """
    targets = {loop.target for call in calls for loop in call.loops}
    names = (name for i in itertools.count() if (name := f"snnfx_loop_{i}") not in targets)
    for call in dict.fromkeys(map(id, calls)):
        _roll_fixed_loops(
            next(c for c in calls if id(c) == call), names, history if call == id(calls[0]) else History()
        )


def _roll_fixed_loops(call: CapturedCall, names: Iterator[str], history: History) -> None:
    if call.time is None:
        return
    loops: list[RolledLoop] = []

    def reroll_loops() -> str:
        loops.extend(roll_all_loops(call.program, names, runs_neurons).loops)
        return note_of_loops(loops)

    run_rewrite("reroll_fixed_loops", call.program, reroll_loops, history)
    _finish(call.program, history)
    call.loops += loops
