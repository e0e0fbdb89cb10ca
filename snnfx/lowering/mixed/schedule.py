"""The order in which one pass runs the calls of a step: before the loop, in it, and after it.

A call is before the loop when no state is behind it, after the loop when no state is computed from it (loop
distribution; Allen & Kennedy, "Optimizing Compilers for Modern Architectures", chapter 5): it then runs once, for all
time steps. In the loop a step is a sequence of stages: what PyTorch computes, then kernels of elementwise calls.
An elementwise call runs with the
first that reads it, which makes the groups few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from snnfx.lowering.aten_recording import AtenCall, Recording
from snnfx.lowering.mixed.call_kinds import BATCHED, VIEWS, calls_behind, stripped
from snnfx.lowering.mixed.fused_group import FusedGroup, is_elementwise

__all__ = ["Goal", "Kinds", "LoopCarried", "Schedule", "Stage"]


@dataclass(frozen=True)
class LoopCarried:
    """A value that goes from each step to the next one.

    Args:
        read: the value before the step, None where the step does not read it.
        following: the value after it, None where it is zero.
    """

    read: int | None
    following: int | None


@dataclass(frozen=True)
class Goal:
    """What a pass is for.

    Args:
        carried: values that go from step to step.
        at_hand: values that are given for all steps.
        stacks: values that are wanted at all steps.
        sums: values whose sum over all steps is wanted.
    """

    carried: tuple[LoopCarried, ...]
    at_hand: frozenset[int]
    stacks: tuple[int, ...]
    sums: tuple[int, ...]


@dataclass
class Stage:
    """Calls of PyTorch in order, then kernels."""

    calls: list[AtenCall] = field(default_factory=list)
    groups: list[FusedGroup] = field(default_factory=list)


class Kinds:
    """What the calls of a recording are: "fused", "view" or "heavy"."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._known: dict[int, str] = {}

    def of(self, call: AtenCall) -> str:
        """The kind of a call."""
        if id(call) not in self._known:
            self._known[id(call)] = self._kind(call)
        return self._known[id(call)]

    def of_value(self, number: int) -> str:
        """The kind of the call that computes a value; "given" for one that nothing computes."""
        call = self.recording.values[number].call
        return "given" if call is None else self.of(call)

    def _kind(self, call: AtenCall) -> str:
        values = self.recording.values
        varying = [r for r in call.references() if values[r].varying]
        fusable = len(call.results) == 1 and is_elementwise(self.recording, call.results[0])
        if call.name in VIEWS and len(dict.fromkeys(varying)) == 1:
            return "fused" if fusable and self.of_value(varying[0]) == "fused" else "view"
        return "fused" if fusable else "heavy"


class Schedule:
    """One pass.

    Args:
        recording: of the step.
        kinds: of its calls.
        goal: what it is for.

    Attributes:
        before, after: calls that run once for all steps.
        stages: of each step.
        kept: values of the loop that are kept at all steps, for what comes after it or as a result.
    """

    def __init__(self, recording: Recording, kinds: Kinds, goal: Goal) -> None:
        self.recording, self.kinds, self.goal = recording, kinds, goal
        values = recording.values
        following = [c.following for c in goal.carried if c.following is not None]
        needed = [
            call
            for call in calls_behind(values, (*following, *goal.stacks, *goal.sums), self._given())
            if any(values[r].varying for r in call.results)
        ]
        self.before, self.after = self._outside(needed, following)
        outside = {id(call) for call in (*self.before, *self.after)}
        self.inside = [call for call in needed if id(call) not in outside]
        made_after = {r for call in self.after for r in call.results}
        self.made_before = {r for call in self.before for r in call.results}
        wanted = dict.fromkeys(n for n in goal.stacks if n not in made_after)
        wanted.update(dict.fromkeys(r for call in self.after for r in call.references() if r not in made_after))
        self.kept = [n for n in wanted if values[n].varying and n not in goal.at_hand and n not in self.made_before]
        self._read: set[int] | None = None
        self.stages = self._stages()

    def _given(self) -> set[int]:
        return {*self.goal.at_hand, *(c.read for c in self.goal.carried if c.read is not None)}

    # -- distribution -----------------------------------------------------------------------------------------------

    def _outside(self, needed: Sequence[AtenCall], following: Sequence[int]) -> tuple[list[AtenCall], list[AtenCall]]:
        """What runs before the loop and after it."""
        values = self.recording.values
        movable = [c for c in needed if c.name in BATCHED and self.kinds.of(c) != "fused"]
        before: list[AtenCall] = []
        free = set(self.goal.at_hand)
        for call in movable:
            if all(r in free for r in call.references() if values[r].varying):
                before.append(call)
                free.update(call.results)
        in_loop = {id(c) for c in calls_behind(values, (*following, *self.goal.sums), self._given())}
        in_loop.update(id(call) for call in before)
        may_follow = {id(call) for call in movable}
        after: list[AtenCall] = []
        read_inside: set[int] = set()
        for call in reversed(needed):  # a call is after the loop when all that reads it is
            if id(call) in may_follow and id(call) not in in_loop and not read_inside.intersection(call.results):
                after.append(call)
            elif not any(call is other for other in before):
                read_inside.update(call.references())
        return before, after[::-1]

    # -- stages -----------------------------------------------------------------------------------------------------

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
            key = (latest[number], stripped(self.recording.values[number].shape))
            members.setdefault(key, set()).add(number)
            group_of[number] = key
        leaving = self._leaving(group_of)
        for key in sorted(members, key=lambda k: (k[0], _count(k[1]))):
            made = [n for n in sorted(members[key]) for _ in range(leaving.get(n, 0))]
            added = [n for n in self.goal.sums if n in members[key]]
            if made or added:
                stages[key[0]].groups.append(FusedGroup(self.recording, key[1], members[key], made, added))
        return [stage for stage in stages if stage.calls or stage.groups]

    def _leaving(self, group_of: dict[int, tuple[int, tuple[int, ...]]]) -> dict[int, int]:
        """Values of groups that leave them, with the number of places that they are written to."""
        found: dict[int, int] = {}
        targets = [*self.kept, *(c.following for c in self.goal.carried if c.following is not None)]
        for number in targets:
            if number in group_of:
                found[number] = found.get(number, 0) + 1
        for call in self.inside:
            for r in call.references():
                if r in group_of and group_of.get(call.results[0]) != group_of[r]:
                    found.setdefault(r, 1)
        return found

    def results_read(self, call: AtenCall) -> list[int]:
        """The results of a call that are used."""
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
