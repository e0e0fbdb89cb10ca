"""Re-roll the loops of a captured call: complete, split and compare their iterations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

from snnfx.errors import CaptureError
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.ops.run_loop import LoopHandle
from snnfx.sequence.alignment import align
from snnfx.sequence.delayed_values import hold_delayed_values
from snnfx.sequence.fission import split_loop
from snnfx.sequence.gated_detaches import gate_detaches
from snnfx.sequence.last_iteration import complete_last_iteration
from snnfx.sequence.loop_kinds import must_be_one_step, runs_over_time
from snnfx.sequence.loop_runs import LoopRun, find_loop_runs
from snnfx.sequence.reason_at_node import ReasonAtNode
from snnfx.sequence.reroll import RolledLoop, reroll
from snnfx.sequence.roles import DependsOnLength, Differs
from snnfx.sequence.size_checks import remove_loop_tests

__all__ = ["RolledLoops", "note_of_loops", "parts_of_loop", "refusal_of_loop", "roll_all_loops", "roll_loop"]

_FEWEST_WITHOUT_LAST = 3
"""Iterations that prove a step if the last one stays outside: two are compared behind the first."""


@dataclass
class RolledLoops:
    """The loops of a call that became steps, and why others did not.

    Args:
        loops: the loops, in execution order.
        unrolled: the reasons of loops that run correctly only iteration by iteration.
        refusals: the reasons of loops whose iterations differ.
    """

    loops: list[RolledLoop] = field(default_factory=list)
    unrolled: list[str] = field(default_factory=list)
    refusals: list[CaptureError] = field(default_factory=list)


def roll_all_loops(
    program: StepProgram, names: Iterator[str], chooses: Callable[[LoopRun], bool] | None = None
) -> RolledLoops:
    """Re-roll the loops over time of a call whose iterations have a fixed number.

    Args:
        program: the program of the call.
        names: yields the get_attr targets of the loops.
        chooses: whether to re-roll a loop; None: all loops.

    Raises:
        CaptureError: SNNFX230, only a part of a loop could become a step.
    """
    rolled = RolledLoops()

    def visit(runs: list[LoopRun]) -> None:
        for run in runs_over_time(program, runs):
            if chooses is not None and not chooses(run):
                continue
            must_agree = must_be_one_step(run)
            try:
                parts = parts_of_loop(program, run)
            except _StaysUnrolled as reason:
                rolled.unrolled.append(f"the loop at {run.location} stays unrolled, because {reason.why}")
                continue
            for part in parts:
                try:
                    rolled.loops.append(roll_loop(program, part, next(names)))
                except CaptureError as error:
                    if len(parts) > 1 and must_be_one_step(part):
                        raise
                    if must_agree:
                        rolled.refusals.append(error)
                    visit([r for inner in part.inner for r in inner])

    visit(find_loop_runs(program.graph))
    return rolled


def note_of_loops(loops: list[RolledLoop]) -> str:
    """A note for the history: the size of each step."""
    found = [f"the loop at {loop.location} is a step of {len(loop.program.graph.nodes)} nodes" for loop in loops]
    return "; ".join(found) or "no loop over time"


def parts_of_loop(program: StepProgram, run: LoopRun, any_length: bool = False) -> list[LoopRun]:
    """The loops that a loop becomes if its iterations do not share all nodes; else the loop itself.

    Raises:
        DependsOnLength: with `any_length`, each iteration calls another module, or some detach a value.
        _StaysUnrolled: each iteration calls another module, which cannot run outside the loop.
    """
    remove_loop_tests(program, run, any_length)
    complete_last_iteration(program, run.bodies)
    if gate_detaches(program, run) and any_length:
        raise DependsOnLength(f"only some iterations of the loop at {run.location} detach a value")
    parts = split_loop(program, run)
    if parts is None:
        return [run]
    if any_length and parts.modules:
        node = parts.modules[1]
        raise DependsOnLength(f"each iteration calls another module, as `{describe_node(node)}`", node)
    last = set(run.bodies[-1])
    early = next((n for n in parts.single if n not in last), None)
    if any_length and parts.blocked is None and early is not None:
        raise DependsOnLength(f"only some iterations run `{describe_node(early)}`", early)
    if parts.blocked is not None:
        if parts.modules and not parts.single:
            name = describe_node(parts.blocked)
            raise _StaysUnrolled(f"each iteration calls another module, as `{name}`, {parts.why}", parts.blocked)
        return [run]
    return parts.runs


class _StaysUnrolled(ReasonAtNode):
    """A loop runs correctly only iteration by iteration."""


def roll_loop(program: StepProgram, run: LoopRun, target: str, any_length: bool = False) -> RolledLoop:
    """Re-roll one loop; its first or last iteration stays outside if it differs.

    Raises:
        CaptureError: SNNFX230, the iterations differ.
        DependsOnLength: with `any_length`, a number of each iteration has no expression for other lengths.
    """
    bodies, difference, is_too_short = run.bodies, None, False
    for first, last in ((0, 0), (1, 0), (0, 1), (1, 1)):
        part = bodies[first : len(bodies) - last]
        if last and len(part) < _FEWEST_WITHOUT_LAST:
            is_too_short |= any_length
            continue
        hold_delayed_values(program, part)
        try:
            alignment = align(program, part)
            rolled = reroll(program, run, alignment, target, any_length)
        except Differs as error:
            difference = difference or error
            continue
        program.constants[target] = LoopHandle(nn.Module(), run.location)
        return rolled
    assert difference is not None
    if isinstance(difference, DependsOnLength):
        raise difference
    if is_too_short:  # the example may have more iterations
        raise DependsOnLength(difference.why, difference.node)
    raise refusal_of_loop(run, difference) from difference


def refusal_of_loop(run: LoopRun, difference: Differs) -> CaptureError:
    """The error for a loop whose iterations differ."""
    return CaptureError(
        "SNNFX230",
        f"the iterations of the loop at {run.location} differ",
        where=difference.location or run.location,
        why=f"{difference.why}; snnfx re-rolls a loop over time into one step.",
        hint='Run the same operations in each iteration, or convert a method that computes one step: entry="step".',
    )
