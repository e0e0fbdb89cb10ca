"""Capture whole calls of a model that runs over time itself, at two lengths if it takes T from its inputs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from snnfx.errors import CaptureError
from snnfx.ir.history import History, PassRecord
from snnfx.ir.pass_manager import PassManager, print_record, run_rewrite
from snnfx.ir.program import StepProgram
from snnfx.ir.program_snapshot import ProgramSnapshot
from snnfx.passes import Normalize, RemoveDeadCode
from snnfx.sequence.element_lists import join_elements
from snnfx.sequence.lengths import Lengths, make_length_variable, require_same_step
from snnfx.sequence.loop_kinds import runs_neurons
from snnfx.sequence.loop_runs import find_loop_runs, move_attributes_first, scaling_runs, share_equal_constants
from snnfx.sequence.pointwise_time import TimeDimension
from snnfx.sequence.reroll import RolledLoop
from snnfx.sequence.roles import DependsOnLength, Differs
from snnfx.sequence.rolling import note_of_loops, parts_of_loop, refusal_of_loop, roll_all_loops, roll_loop
from snnfx.sequence.size_checks import move_size_checks_first
from snnfx.sequence.time_dimension import SHORT, FoundTime, TracedCalls
from snnfx.sequence.written_elements import forward_written_elements

__all__ = ["CapturedCall", "capture_calls", "roll_fixed_loops"]


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
    traced = TracedCalls(model, example_inputs, entry)
    try:
        found = traced.find_time()
        short, long = found.short, found.long
        records = History()
        _record_capture(short[0], f"capture{{time_steps={SHORT}}}", start, records)
        of_training = _of_any_length(short[0], long[0], found, records, names)
        of_evaluation = of_training
        if short[1] is not short[0]:
            of_evaluation = _of_any_length(short[1], long[1], found, History(), names)
    except DependsOnLength as dependence:
        why_fixed = f"{dependence.why} ({dependence.location})" if dependence.location else dependence.why
    else:
        history += records
        return of_training, of_evaluation
    training, evaluation = traced.capture()
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


# -- re-rolling -------------------------------------------------------------------------------------------------------


def _of_any_length(
    short: StepProgram,
    long: StepProgram,
    found: FoundTime,
    history: History,
    names: Iterator[str],
) -> CapturedCall:
    """Re-roll the loops of two calls, and make the number of time steps variable."""
    loops: list[RolledLoop] = []
    dimension = found.dimension

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
            make_length_variable(short, long, Lengths(SHORT, found.length, dimension.leaves[0], dimension.dim))
        except Differs as difference:
            why = f"the code around the loops depends on it: {difference.why}"
            raise DependsOnLength(why, difference.node) from difference
        return f"compared with the call of {found.length} time steps"

    _prepare(long, History())
    _prepare(short, history)
    run_rewrite("reroll_loops", short, reroll_loops, history)
    _finish(long, History())
    _finish(short, history)
    run_rewrite("make_length_variable", short, free_length, history)
    return CapturedCall(short, loops, time=replace(dimension, size=SHORT))


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
