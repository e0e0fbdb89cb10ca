"""Schedule the calls of a pass: before, in and after the loop.

A call that depends on no state runs before the loop, and a call on which no state depends runs after it, once for all
time steps (loop distribution; Allen & Kennedy, "Optimizing Compilers for Modern Architectures", chapter 5). In the loop
a step is a sequence of stages, each of them calls of PyTorch followed by kernels of fused element-wise calls. An
element-wise call joins the stage of its first reader, so that there are few kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from snnfx.lowering.aten_recording import AtenCall, Recording
from snnfx.lowering.mixed.call_kinds import (
    calls_needed_for,
    product_with_constant,
    runs_batched,
    without_leading_ones,
)
from snnfx.lowering.mixed.convolution_calls import convolution_with_constant
from snnfx.lowering.mixed.fused_group import FusedGroup, is_elementwise
from snnfx.lowering.mixed.parts import parts_of

__all__ = ["CallKinds", "LoopCarried", "PassGoal", "Schedule", "Stage"]


@dataclass(frozen=True)
class LoopCarried:
    """A loop-carried value.

    Args:
        read: the value before the step, None if the step does not read it.
        following: the value after the step, None if it is zero.
    """

    read: int | None
    following: int | None


@dataclass(frozen=True)
class PassGoal:
    """Inputs and results of a pass.

    Args:
        carried: the loop-carried values.
        given: values that are given for all steps.
        stacks: values to return for all steps.
        sums: values whose sum over all steps is to be returned.
    """

    carried: tuple[LoopCarried, ...]
    given: frozenset[int]
    stacks: tuple[int, ...]
    sums: tuple[int, ...]


@dataclass
class Stage:
    """Calls of PyTorch in order, then fused kernels."""

    calls: list[AtenCall] = field(default_factory=list)
    groups: list[FusedGroup] = field(default_factory=list)


class CallKinds:
    """Classifies the calls of a recording: "fused" (element-wise), "view" or "heavy" (computed by PyTorch)."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._known: dict[int, str] = {}

    def of(self, call: AtenCall) -> str:
        """The kind of a call."""
        if id(call) not in self._known:
            self._known[id(call)] = self._kind(call)
        return self._known[id(call)]

    def of_value(self, number: int) -> str:
        """The kind of the call that computes a value; "given" for a value without a call."""
        call = self.recording.values[number].call
        return "given" if call is None else self.of(call)

    def _kind(self, call: AtenCall) -> str:
        values = self.recording.values
        varying = [r for r in call.references() if values[r].varying]
        fusable = len(call.results) == 1 and is_elementwise(self.recording, call.results[0])
        if call.traits.view == "view" and len(dict.fromkeys(varying)) == 1:
            return "fused" if fusable and self.of_value(varying[0]) == "fused" else "view"
        return "fused" if fusable else "heavy"


class Schedule:
    """The schedule of one pass.

    Args:
        recording: the recorded step.
        kinds: the kinds of its calls.
        goal: inputs and results of the pass.
        by_events: whether products may visit only the elements of their operands that are not zero.

    Attributes:
        before, after: calls that run once for all steps.
        inside: calls of the loop.
        stages: the stages of each step.
        stacked: values of the loop that are stored for all steps, because a later call reads them or as results.
        reason_for_python: why Python code ran the steps of the latest run, "" for compiled code; None before it.
        density: the fraction of the operands of products that was not zero in the latest run, if it was counted.
        kept_runs, unrepeatable_runs: see `snnfx.lowering.mixed.bound_runs`.
    """

    reason_for_python: str | None = None
    density: float | None = None

    def __init__(self, recording: Recording, kinds: CallKinds, goal: PassGoal, by_events: bool = False) -> None:
        self.recording, self.kinds, self.goal, self.by_events = recording, kinds, goal, by_events
        self.kept_runs: dict[Any, Any] = {}
        self.unrepeatable_runs: set[Any] = set()
        values = recording.values
        following = [c.following for c in goal.carried if c.following is not None]
        needed = [
            call
            for call in calls_needed_for(values, (*following, *goal.stacks, *goal.sums), self._given_values())
            if any(values[r].varying for r in call.results)
        ]
        self.before, self.after = self._outside(needed, following)
        outside = {id(call) for call in (*self.before, *self.after)}
        self.inside = [call for call in needed if id(call) not in outside]
        made_after = {r for call in self.after for r in call.results}
        self.made_before = {r for call in self.before for r in call.results}
        wanted = dict.fromkeys(n for n in goal.stacks if n not in made_after)
        wanted.update(dict.fromkeys(r for call in self.after for r in call.references() if r not in made_after))
        self.stacked = [n for n in wanted if values[n].varying and n not in goal.given and n not in self.made_before]
        self._read: set[int] | None = None
        self.stages = self._stages()

    @property
    def calls_of_pytorch(self) -> list[str]:
        """Names of the operators of a step that compiled code does not know."""
        values, calls = self.recording.values, [call for stage in self.stages for call in stage.calls]
        heavy = [call for call in calls if self.kinds.of(call) == "heavy"]
        other = [c for c in heavy if not parts_of(c, values) and product_with_constant(c, values) is None]
        other = [c for c in other if convolution_with_constant(c, self.results_read(c), values) is None]
        return list(dict.fromkeys(call.name for call in other))

    def _given_values(self) -> set[int]:
        return {*self.goal.given, *(c.read for c in self.goal.carried if c.read is not None)}

    def _outside(self, needed: Sequence[AtenCall], following: Sequence[int]) -> tuple[list[AtenCall], list[AtenCall]]:
        """The calls before the loop and the calls after it."""
        values = self.recording.values
        movable = [c for c in needed if runs_batched(c) and self.kinds.of(c) != "fused"]
        before: list[AtenCall] = []
        free = set(self.goal.given)
        for call in movable:
            if all(r in free for r in call.references() if values[r].varying):
                before.append(call)
                free.update(call.results)
        in_loop = {id(c) for c in calls_needed_for(values, (*following, *self.goal.sums), self._given_values())}
        in_loop.update(id(call) for call in before)
        may_follow = {id(call) for call in movable}
        after: list[AtenCall] = []
        read_inside: set[int] = set()
        for call in reversed(needed):  # a call runs after the loop if all its readers do
            if id(call) in may_follow and id(call) not in in_loop and not read_inside.intersection(call.results):
                after.append(call)
            elif not any(call is other for other in before):
                read_inside.update(call.references())
        return before, after[::-1]

    def _stages(self) -> list[Stage]:
        fused = {r for call in self.inside if self.kinds.of(call) == "fused" for r in call.results}
        made_in_loop = {r for call in self.inside for r in call.results}
        earliest: dict[int, int] = {}
        for call in self.inside:
            is_fused = self.kinds.of(call) == "fused"
            stage = 0
            for r in call.references():
                if r in made_in_loop:
                    stage = max(stage, earliest[r] + (0 if is_fused or r not in fused else 1))
            earliest.update(dict.fromkeys(call.results, stage))
        last = max(earliest.values(), default=0)
        latest: dict[int, int] = {}
        for call in reversed(self.inside):
            is_fused = self.kinds.of(call) == "fused"
            first = earliest[call.results[0]]
            stage = latest.get(call.results[0], first) if is_fused else first
            for r in call.references():
                if r in made_in_loop:
                    latest[r] = min(latest.get(r, last), stage - (0 if is_fused or r not in fused else 1))
            if is_fused:
                latest[call.results[0]] = stage
        stages = [Stage() for _ in range(last + 1)]
        members: dict[tuple[int, tuple[int, ...]], set[int]] = {}
        group_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        for call in self.inside:
            if self.kinds.of(call) != "fused":
                stages[earliest[call.results[0]]].calls.append(call)
                continue
            number = call.results[0]
            key = (latest[number], without_leading_ones(self.recording.values[number].shape))
            members.setdefault(key, set()).add(number)
            group_of[number] = key
        exports = self._values_read_outside(group_of)
        for key in sorted(members, key=lambda k: (k[0], _count(k[1]))):
            made = [n for n in sorted(members[key]) for _ in range(exports.get(n, 0))]
            added = [n for n in self.goal.sums if n in members[key]]
            if made or added:
                stages[key[0]].groups.append(FusedGroup(self.recording, key[1], members[key], made, added))
        return [stage for stage in stages if stage.calls or stage.groups]

    def _values_read_outside(self, group_of: dict[int, tuple[int, tuple[int, ...]]]) -> dict[int, int]:
        """The values of groups that are read outside their group: `{value: number of buffers it is written to}`."""
        exports: dict[int, int] = {}
        targets = [*self.stacked, *(c.following for c in self.goal.carried if c.following is not None)]
        for number in targets:
            if number in group_of:
                exports[number] = exports.get(number, 0) + 1
        for call in self.inside:
            for r in call.references():
                if r in group_of and group_of.get(call.results[0]) != group_of[r]:
                    exports.setdefault(r, 1)
        return exports

    def results_read(self, call: AtenCall) -> list[int]:
        """The results of a call that are read, or returned by the pass."""
        if self._read is None:
            self._read = {r for c in (*self.before, *self.inside, *self.after) for r in c.references()}
            self._read.update((*self.goal.stacks, *self.goal.sums))
            self._read.update(c.following for c in self.goal.carried if c.following is not None)
        return [r for r in call.results if r in self._read]


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
