"""Run the schedule of a pass over the time steps, without autograd.

All memory is allocated in advance. Every value that a kernel or a call writes has a ring buffer: a tensor `[R, *]`, of
which each step uses one row. Values that are stored for all steps have a row for each step, loop-carried values two
rows, all other values one. All addresses are thus known before the loop, and a step is a few calls with precomputed
views and addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, Recording, ValueReference
from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.elementwise.cpp.cpp_launch import address_words, pack_arguments
from snnfx.lowering.elementwise.operand_layout import dense_strides, describe_operand, plan_layout
from snnfx.lowering.mixed.batched_calls import run_batched
from snnfx.lowering.mixed.call_kinds import FunctionalCall
from snnfx.lowering.mixed.fused_group import FusedGroup, operand_dtype
from snnfx.lowering.mixed.placed_parts import JOINS, Places, places_of_parts
from snnfx.lowering.mixed.schedule import Schedule
from snnfx.ops.buffer_pool import pool

__all__ = ["PassResult", "run_schedule"]

_MIN_PARALLEL_ELEMENTS = 1 << 14
"""Elements of a step from which on a kernel uses several threads."""

_STRUCTS_AT_ONCE = 1024
"""Iterations for which the argument structs of a kernel are built at once."""


class RingBuffer:
    """The memory of a value.

    Args:
        tensor: `[R, *]`.
        rows: the row that each iteration uses.
    """

    def __init__(self, tensor: Tensor, rows: Sequence[int]) -> None:
        self.tensor, self.rows = tensor, rows
        self._steps: list[Tensor] | None = None

    def steps(self) -> list[Tensor]:
        """The value of each iteration, as views."""
        if self._steps is None:
            views = self.tensor.unbind(0)
            self._steps = [views[k] for k in self.rows]
        return self._steps

    def viewed(self, tensor: Tensor) -> RingBuffer:
        """The same rows of another tensor `[R, *]`."""
        return RingBuffer(tensor, self.rows)


class PassResult:
    """The results of a pass.

    Args:
        stacks: the values at all steps, `[T, *]`, of `PassGoal.stacks`.
        sums: the sums over time of `PassGoal.sums`.
        finals: the loop-carried values after the last step, in the order of `PassGoal.carried`.
    """

    def __init__(self, stacks: dict[int, Tensor], sums: dict[int, Tensor], finals: list[Tensor]) -> None:
        self.stacks, self.sums, self.finals = stacks, sums, finals


def run_schedule(
    schedule: Schedule,
    T: int,
    stacks: dict[int, Tensor],
    invariants: dict[int, Tensor],
    initial: Sequence[Tensor | float],
    reverse: bool,
    unshared: Sequence[int] = (),
) -> PassResult:
    """Run a pass.

    Args:
        schedule: the schedule of the pass.
        T: the number of steps.
        stacks: the given values, `[T, *]` each.
        invariants: the values that do not change with time.
        initial: the loop-carried values before the first iteration: numbers, or tensors that can be expanded to a step.
        reverse: whether to run from the last step to the first.
        unshared: stacks of the result that must not share memory with another tensor.
    """
    with torch.no_grad():
        return _ScheduleRun(schedule, T, dict(stacks), invariants, initial, reverse).result(unshared)


class _ScheduleRun:
    """One run: allocates the ring buffers, builds the operations of a step, runs them for each step."""

    def __init__(
        self,
        schedule: Schedule,
        T: int,
        stacks: dict[int, Tensor],
        invariants: dict[int, Tensor],
        initial: Sequence[Tensor | float],
        reverse: bool,
    ) -> None:
        self.schedule, self.T, self.stacks, self.invariants = schedule, T, stacks, invariants
        self.recording: Recording = schedule.recording
        self.values = self.recording.values
        self.order = list(range(T - 1, -1, -1)) if reverse else list(range(T))
        self.reverse = reverse
        run_batched(self.recording, schedule.before, schedule.results_read, stacks, invariants)
        self.rings: dict[Any, RingBuffer] = {}
        self.targets: dict[int, list[RingBuffer]] = {}
        self.keep_alive: list[Any] = []
        self.stacked = set(schedule.stacked)
        self.with_stacked_parts = self._with_stacked_parts()
        self.carried = [self._carry(k, value) for k, value in enumerate(initial)]
        self.sums = {n: self._sum_ring(n) for n in schedule.goal.sums}
        placed = self._calls_to_place()
        parts = {number for _, places in placed for number, _ in places}
        for number in schedule.stacked:
            if number not in self.rings and number not in parts:
                self._add_stack(number)
        for call, places in placed:
            self._place_parts(call, places)
        self.written_in_place = {call.results[0] for call, _ in placed}
        self.operations: list[Callable[[int], None]] = []
        for stage in schedule.stages:
            for call in stage.calls:
                self._call(call)
            for group in stage.groups:
                self._group(group)
        self._move_uncomputed_values()
        for i in range(T):
            for operation in self.operations:
                operation(i)

    def _empty(self, count: int, number: int) -> Tensor:
        value = self.values[number]
        shape = (count, *value.shape)
        return pool.empty(shape, dense_strides(shape, range(len(shape))), value.dtype)

    def _carry(self, k: int, initial: Tensor | float) -> tuple[RingBuffer, RingBuffer]:
        """The ring buffers from which a loop-carried value is read and to which its next value is written."""
        carried = self.schedule.goal.carried[k]
        number = carried.following if carried.following is not None else carried.read
        assert number is not None
        T = self.T
        if carried.following is None:
            ring = self._empty(2, number).zero_()
            read, write = [0] + [1] * (T - 1), [1] * T
        elif carried.read in self.stacked or number in self.with_stacked_parts:
            ring, later = self._empty(T + 1, number), [t + 1 for t in self.order]
            read, write = (later, self.order) if self.reverse else (self.order, later)
        else:
            ring = self._empty(2, number)
            read, write = [i % 2 for i in range(T)], [(i + 1) % 2 for i in range(T)]
        if isinstance(initial, Tensor):
            ring[read[0]].copy_(initial)
        else:
            ring[read[0]].fill_(initial)
        before, after = RingBuffer(ring, read), RingBuffer(ring, write)
        if carried.read is not None:
            self.rings[carried.read] = before
        if carried.following is not None:
            self.targets.setdefault(carried.following, []).append(after)
        return before, after

    def _sum_ring(self, number: int) -> tuple[RingBuffer, RingBuffer]:
        ring = self._empty(2, number)
        ring[0].zero_()
        read, write = [i % 2 for i in range(self.T)], [(i + 1) % 2 for i in range(self.T)]
        self.rings["sum", number] = RingBuffer(ring, read)
        return self.rings["sum", number], RingBuffer(ring, write)

    def _add_stack(self, number: int) -> None:
        self.targets.setdefault(number, []).append(RingBuffer(self._empty(self.T, number), self.order))
        self.stacks[number] = self.targets[number][-1].tensor

    def _with_stacked_parts(self) -> set[int]:
        """The results of joins of which at least half of the parts are stored for all steps: the result stores them."""
        calls = [call for stage in self.schedule.stages for call in stage.calls if call.name in JOINS]
        places = {call.results[0]: places_of_parts(call, self.values) for call in calls}
        return {result for result, of in places.items() if of and 2 * sum(n in self.stacked for n, _ in of) >= len(of)}

    def _calls_to_place(self) -> list[tuple[AtenCall, Places]]:
        """The calls whose parts kernels write to their places in the result, so that the call itself need not run."""
        made = Counter(n for stage in self.schedule.stages for group in stage.groups for n in group.made)
        found: list[tuple[AtenCall, Places]] = []
        placed = set(self.targets)
        for stage in self.schedule.stages:
            for call in stage.calls:
                places = places_of_parts(call, self.values)
                parts = [number for number, _ in places]
                if not parts or len(set(parts)) < len(parts) or any(made[n] != 1 or n in placed for n in parts):
                    continue
                if self.stacked.isdisjoint(parts) or self._has_row_of_each_step(call.results[0]):
                    found.append((call, places))
                    placed.update(parts)
        return found

    def _has_row_of_each_step(self, number: int) -> bool:
        rings = self.targets.get(number)
        return len(set(rings[0].rows)) == self.T if rings else number in self.stacked

    def _place_parts(self, call: AtenCall, places: Places) -> None:
        whole = self._targets_of(call.results[0])[0]
        if call.name not in JOINS:
            whole.tensor.zero_()
        first = min(whole.rows)
        for number, place in places:
            part = place(whole.tensor)
            self.targets[number] = [whole.viewed(part)]
            if number in self.stacked:
                self.stacks[number] = part[first : first + self.T]

    def _ring(self, number: int) -> RingBuffer:
        """The ring buffer from which a value is read."""
        ring = self.rings.get(number)
        if ring is None:
            assert number in self.stacks, number
            ring = self.rings[number] = RingBuffer(self.stacks[number], self.order)
        return ring

    def _targets_of(self, number: int) -> list[RingBuffer]:
        """The ring buffers to which a computed value is written; readers use the first one."""
        rings = self.targets.get(number)
        if not rings:
            rings = self.targets[number] = [RingBuffer(self._empty(1, number), [0] * self.T)]
        self.rings[number] = rings[0]
        return rings

    def _argument(self, argument: Any) -> Any:
        """The values of a reference at all iterations."""
        if argument.number in self.invariants:
            return [self.invariants[argument.number]] * self.T
        return self._ring(argument.number).steps()

    def _call(self, call: AtenCall) -> None:
        wanted = self.schedule.results_read(call)
        if not wanted:
            return
        if self.schedule.kinds.of(call) == "view" and self._view(call, wanted):
            return
        results = [self._targets_of(n) for n in wanted]
        if call.results[0] in self.written_in_place:
            pass
        elif call.name in _WITH_OUT and len(wanted) == 1 and not call.kwargs:
            self.operations.append(self._call_with_out(call, results[0][0].steps()))
        else:
            self.operations.append(self._call_and_copy(call, wanted, [r[0].steps() for r in results]))
        for rings in results:
            for other in rings[1:]:
                self.operations.append(_copier(rings[0].steps(), other.steps()))

    def _view(self, call: AtenCall, wanted: Sequence[int]) -> bool:
        """Make a view of a ring buffer once for all steps; False if the operator copies."""
        numbers = [r for r in dict.fromkeys(call.references()) if self.values[r].varying]
        ring = self._ring(numbers[0])
        stacks = {numbers[0]: ring.tensor}
        run_batched(self.recording, [call], lambda _: wanted, stacks, self.invariants)
        if any(stacks[n].untyped_storage().data_ptr() != ring.tensor.untyped_storage().data_ptr() for n in wanted):
            return False
        for number in wanted:
            self.rings[number] = ring.viewed(stacks[number])
            for other in self.targets.get(number, ()):
                self.operations.append(_copier(self.rings[number].steps(), other.steps()))
        return True

    def _call_with_out(self, call: AtenCall, out: list[Tensor]) -> Callable[[int], None]:
        """The operation of a call that writes its result with `out=`."""
        if call.name == "cat":
            parts = [self._argument(a) for a in call.args[0]]
            dim = call.args[1] if len(call.args) > 1 else 0

            def concatenate(i: int) -> None:
                torch.cat([p[i] for p in parts], dim, out=out[i])

            return concatenate
        operands = [self._argument(a) for a in call.args]
        if call.name == "addmm":
            bias, left, right = operands

            def add_product(i: int) -> None:
                torch.addmm(bias[i], left[i], right[i], out=out[i])

            return add_product
        left, right = operands
        function = torch.mm if call.name == "mm" else torch.bmm

        def product(i: int) -> None:
            function(left[i], right[i], out=out[i])

        return product

    def _call_and_copy(self, call: AtenCall, wanted: Sequence[int], out: list[list[Tensor]]) -> Callable[[int], None]:
        """The operation of any other call: its results are copied to their ring buffers."""
        functional = FunctionalCall(call, wanted, self.recording)
        numbers = {r: self._argument(ValueReference(r)) for r in dict.fromkeys(call.references())}

        def compute(i: int) -> None:
            known = {number: steps[i] for number, steps in numbers.items()}
            for result, steps in zip(functional.on(known), out, strict=True):
                steps[i].copy_(result)

        return compute

    def _group(self, group: FusedGroup) -> None:
        """Add the launch of a kernel; the argument structs of its iterations differ only in addresses."""
        operands: list[tuple[Tensor, Sequence[int] | None]] = []
        unused_buffers: dict[int, list[RingBuffer]] = {}
        for slot in group.source.slots:
            if slot.kind == "operand":
                operands.append((self._operand(group, slot.index), None))
                continue
            location = group.read_location(slot.index) if slot.kind == "sequence" else group.write_location(slot.index)
            if isinstance(location, tuple):
                ring = self.sums[location[1]][0 if slot.kind == "sequence" else 1]
            elif slot.kind == "sequence":
                ring = self._ring(location)
            else:
                if location not in unused_buffers:
                    unused_buffers[location] = list(self._targets_of(location))
                ring = unused_buffers[location].pop(0)
            operands.append((ring.tensor, ring.rows))
        described = []
        for tensor, rows in operands:
            shape, stride, _ = describe_operand(tensor if rows is None else tensor[0], False)
            drop = max(0, len(shape) - len(group.shape))
            described.append((shape[drop:], stride[drop:], False))
        layout = plan_layout(group.shape, tuple(range(len(group.shape))), tuple(described))
        if layout.elements:
            threads = (
                torch.get_num_threads() if layout.elements >= _MIN_PARALLEL_ELEMENTS and openmp() is not None else 1
            )
            words = pack_arguments(group.source, layout, 1, [(t.data_ptr(), 0.0) for t, _ in operands], threads)
            addresses = {
                word: (tensor.data_ptr(), tensor.stride(0) * tensor.element_size(), rows)
                for word, (tensor, rows) in zip(address_words(group.source), operands, strict=True)
                if rows is not None
            }
            self.keep_alive += [tensor for tensor, _ in operands]
            self.operations.append(_launcher(group, words, addresses, self.T))

    def _operand(self, group: FusedGroup, index: int) -> Tensor:
        tensor = self.invariants[group.operands[index]]
        return tensor.to(operand_dtype(tensor.dtype)).resolve_neg()

    def _move_uncomputed_values(self) -> None:
        """Copy or sum the loop-carried, stored and summed values that no call of the loop computes."""
        made = {r for call in self.schedule.inside for r in call.results}
        for number, rings in self.targets.items():
            if number not in made:
                source = self._argument(ValueReference(number))
                for ring in rings:
                    self.operations.append(_copier(source, ring.steps()))
        fused = {n for stage in self.schedule.stages for group in stage.groups for n in group.added}
        for number, (read, write) in self.sums.items():
            if number not in fused:
                self.operations.append(_adder(self._argument(ValueReference(number)), read.steps(), write.steps()))

    def result(self, unshared: Sequence[int]) -> PassResult:
        """Run the calls after the loop and collect the results."""
        goal, T = self.schedule.goal, self.T
        rings = {k: before.tensor for k, (before, _) in enumerate(self.carried) if goal.carried[k].read in self.stacked}
        for k, tensor in rings.items():
            read = goal.carried[k].read
            assert read is not None
            self.stacks[read] = tensor[1:] if self.reverse else tensor[:-1]
        schedule = self.schedule
        run_batched(self.recording, schedule.after, schedule.results_read, self.stacks, self.invariants)
        stacks: dict[int, Tensor] = {}
        given = {*goal.given, *(c.read for c in goal.carried)}
        for number in goal.stacks:
            stack = self.stacks.get(number)
            if stack is None:
                value = self.invariants[number]
                stack = value.expand(T, *value.shape)
            stacks[number] = (
                stack.clone() if number in unshared and (number in given or not self._has_own_stack(number)) else stack
            )
        sums = {n: write.tensor[T % 2] for n, (_, write) in self.sums.items()}
        finals = [after.tensor[after.rows[-1]] for _, after in self.carried]
        return PassResult(stacks, sums, finals)

    def _has_own_stack(self, number: int) -> bool:
        """Whether a value has a stack that no other value shares."""
        return any(ring.tensor is self.stacks[number] for ring in self.targets.get(number, ()))


_WITH_OUT = frozenset(("mm", "addmm", "bmm", "cat"))


def _copier(source: list[Tensor], target: list[Tensor]) -> Callable[[int], None]:
    def copy(i: int) -> None:
        target[i].copy_(source[i])

    return copy


def _adder(term: list[Tensor], so_far: list[Tensor], following: list[Tensor]) -> Callable[[int], None]:
    def add(i: int) -> None:
        torch.add(so_far[i], term[i], out=following[i])

    return add


def _launcher(
    group: FusedGroup, words: list[int], addresses: dict[int, tuple[int, int, Sequence[int]]], T: int
) -> Callable[[int], None]:
    """The operation that launches a kernel; its argument structs are built for many iterations at once.

    Args:
        group: the kernel.
        words: the struct of arguments.
        addresses: for each word that differs between iterations: address of row 0, bytes of a row, rows.
        T: the number of iterations.
    """
    run = load(group.source).run
    count = min(T, _STRUCTS_AT_ONCE)
    table = torch.tensor(words, dtype=torch.int64).repeat(count, 1)
    start, step = table.data_ptr(), table.stride(0) * table.element_size()

    def launch(i: int) -> None:
        row = i % count
        if row == 0:
            for word, (address, size, rows) in addresses.items():
                part = torch.tensor(rows[i : i + count], dtype=torch.int64)
                table[: len(part), word] = part * size + address
        run(start + row * step)

    return launch
