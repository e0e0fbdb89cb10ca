"""Run the schedule of a pass over the time steps, without autograd.

All memory is allocated in advance. Every value that a kernel or a call writes has a ring buffer: a tensor `[R, *]`, of
which each step uses one row. Values that are stored for all steps have a row for each step, loop-carried values two
rows, all other values one. All addresses are thus known before the loop, and a step is a few calls with precomputed
views and addresses. One call of compiled code runs all steps, or Python code runs them one by one. A run can be
repeated after new values were written to the given tensors (`snnfx.lowering.mixed.bound_runs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, Recording, resolve_references
from snnfx.lowering.elementwise.cpp.build import openmp
from snnfx.lowering.elementwise.cpp.cpp_launch import address_words, pack_arguments
from snnfx.lowering.elementwise.operand_layout import dense_strides, describe_operand, plan_layout
from snnfx.lowering.mixed.batched_calls import run_batched
from snnfx.lowering.mixed.call_kinds import FunctionalCall, product_with_constant
from snnfx.lowering.mixed.compiled_loop import CompiledLoop, reason_against_compiling
from snnfx.lowering.mixed.convolution_calls import convolution_with_constant
from snnfx.lowering.mixed.fused_group import FusedGroup, operand_dtype
from snnfx.lowering.mixed.operations import (
    Addition,
    Assembly,
    Call,
    Convolution,
    Copy,
    Iteration,
    Launch,
    Operation,
    Product,
)
from snnfx.lowering.mixed.parts import JOINS, Part, is_placed, parts_of
from snnfx.lowering.mixed.pass_result import PassResult, where_it_is
from snnfx.lowering.mixed.ring_buffers import RingBuffer, Rows
from snnfx.lowering.mixed.schedule import Schedule
from snnfx.ops.buffer_pool import pool

__all__ = ["ScheduleRun"]

_MIN_PARALLEL_ELEMENTS = 1 << 14
"""Elements of a step from which on a kernel uses several threads."""


class ScheduleRun:
    """One run: allocates the ring buffers, builds the operations of a step, runs them for each step.

    Args:
        schedule: the schedule of the pass.
        T: the number of steps.
        stacks: the given values, `[T, *]` each.
        invariants: the values that do not change with time.
        carried: the number of loop-carried values.
        reverse: whether to run from the last step to the first.

    Attributes:
        copies_given: whether an operation reads a copy of a given tensor, which a repeated run would not update.
        row_copies: copies that a repeated run has to update, with the tensors that they are copies of.
        zeroed: tensors whose elements are zero where no operation writes them.
    """

    def __init__(
        self,
        schedule: Schedule,
        T: int,
        stacks: dict[int, Tensor],
        invariants: dict[int, Tensor],
        carried: int,
        reverse: bool,
    ) -> None:
        self.schedule, self.T, self.stacks, self.invariants = schedule, T, stacks, invariants
        self.recording: Recording = schedule.recording
        self.values = self.recording.values
        self.rows = Rows(T, reverse)
        self.reverse = reverse
        run_batched(self.recording, schedule.before, schedule.results_read, stacks, invariants)
        self.rings: dict[Any, RingBuffer] = {}
        self.targets: dict[int, list[RingBuffer]] = {}
        self.copies_given = False
        self.row_copies: list[tuple[Tensor, Tensor]] = []
        self.zeroed: list[Tensor] = []
        self.stacked = set(schedule.stacked)
        self.with_stacked_parts = self._with_stacked_parts()
        self.carried = [self._carry(k) for k in range(carried)]
        self.first = [before.tensor[int(before.rows[0])] for before, _ in self.carried]
        self.finals = [after.tensor[int(after.rows[-1])] for _, after in self.carried]
        self.sums = {n: self._sum_ring(n) for n in schedule.goal.sums}
        placed = self._calls_to_place()
        in_place = {part.number for _, parts in placed for part in parts}
        for number in schedule.stacked:
            if number not in self.rings and number not in in_place:
                self._add_stack(number)
        for call, parts in placed:
            self._place_parts(call, parts)
        self.written_in_place = {call.results[0] for call, _ in placed}
        self.operations: list[Operation] = []
        for stage in schedule.stages:
            for call in stage.calls:
                self._call(call)
            for group in stage.groups:
                self._group(group)
        self._move_uncomputed_values()
        self.reason_for_python = reason_against_compiling(self.operations)
        self.iterations: list[Iteration] = []
        if self.reason_for_python:
            self.iterations = [operation.iteration(T) for operation in self.operations]
        else:
            self.compiled = CompiledLoop(self.operations, T, schedule.by_events)
            self.copies_given |= self.compiled.copies_given

    def run(self, initial: Sequence[Tensor | float], moved: Callable[[Tensor], Tensor] = where_it_is) -> None:
        """Run all iterations.

        Args:
            initial: the loop-carried values before the first one: numbers, or tensors that can be expanded to a step.
            moved: returns a tensor of the run at the place where the operations use it.
        """
        for ring_row, value in zip(self.first, initial, strict=True):
            first = moved(ring_row)
            if isinstance(value, Tensor):
                first.copy_(value)
            else:
                first.fill_(value)
        for read, _ in self.sums.values():
            read.tensor[0].zero_()
        self.schedule.reason_for_python = self.reason_for_python
        if not self.reason_for_python:
            self.schedule.density = self.compiled.run()
            return
        for i in range(self.T):
            for iteration in self.iterations:
                iteration(i)

    def _empty(self, count: int, number: int) -> Tensor:
        value = self.values[number]
        shape = (count, *value.shape)
        return pool.empty(shape, dense_strides(shape, range(len(shape))), value.dtype)

    def _carry(self, k: int) -> tuple[RingBuffer, RingBuffer]:
        """The ring buffers from which a loop-carried value is read and to which its next value is written."""
        carried = self.schedule.goal.carried[k]
        number = carried.following if carried.following is not None else carried.read
        assert number is not None
        rows = self.rows
        if carried.following is None:
            ring = self._empty(2, number).zero_()
            read, write = rows.first_then_one, rows.one
        elif carried.read in self.stacked or number in self.with_stacked_parts:
            ring, later = self._empty(self.T + 1, number), rows.step + 1
            read, write = (later, rows.step) if self.reverse else (rows.step, later)
        else:
            ring = self._empty(2, number)
            read, write = rows.this, rows.other
        before, after = RingBuffer(ring, read), RingBuffer(ring, write)
        if carried.read is not None:
            self.rings[carried.read] = before
        if carried.following is not None:
            self.targets.setdefault(carried.following, []).append(after)
        return before, after

    def _sum_ring(self, number: int) -> tuple[RingBuffer, RingBuffer]:
        ring = self._empty(2, number)
        self.rings["sum", number] = RingBuffer(ring, self.rows.this)
        return self.rings["sum", number], RingBuffer(ring, self.rows.other)

    def _add_stack(self, number: int) -> None:
        self.targets.setdefault(number, []).append(RingBuffer(self._empty(self.T, number), self.rows.step))
        self.stacks[number] = self.targets[number][-1].tensor

    def _with_stacked_parts(self) -> set[int]:
        """The results of joins of which at least half of the parts are stored for all steps: the result stores them."""
        calls = [call for stage in self.schedule.stages for call in stage.calls if call.name in JOINS]
        parts = {call.results[0]: self._placeable(call) for call in calls}
        return {
            result
            for result, found in parts.items()
            if found and 2 * sum(part.number in self.stacked for part in found) >= len(found)
        }

    def _placeable(self, call: AtenCall) -> list[Part]:
        """The parts of a call if all of them are contiguous in its result, else []."""
        parts = parts_of(call, self.values)
        return parts if all(is_placed(part, self.values[call.results[0]]) for part in parts) else []

    def _calls_to_place(self) -> list[tuple[AtenCall, list[Part]]]:
        """The calls whose parts kernels write to their places in the result, so that the call itself need not run."""
        made = Counter(n for stage in self.schedule.stages for group in stage.groups for n in group.made)
        found: list[tuple[AtenCall, list[Part]]] = []
        placed = set(self.targets)
        for stage in self.schedule.stages:
            for call in stage.calls:
                parts = self._placeable(call)
                numbers = [part.number for part in parts]
                if not parts or len(set(numbers)) < len(numbers) or any(made[n] != 1 or n in placed for n in numbers):
                    continue
                if call.name not in JOINS and call.results[0] in self.targets:
                    continue  # its first row has the value before the loop, which zeros would replace
                if self.stacked.isdisjoint(numbers) or self._has_row_of_each_step(call.results[0]):
                    found.append((call, parts))
                    placed.update(numbers)
        return found

    def _has_row_of_each_step(self, number: int) -> bool:
        rings = self.targets.get(number)
        return len(rings[0].rows.unique()) == self.T if rings else number in self.stacked

    def _place_parts(self, call: AtenCall, parts: Sequence[Part]) -> None:
        whole = self._targets_of(call.results[0])[0]
        if call.name not in JOINS:
            whole.tensor.zero_()
            self.zeroed.append(whole.tensor)
        first = int(whole.rows.min())
        for part in parts:
            view = part.of(whole.tensor)
            self.targets[part.number] = [whole.viewed(view)]
            if part.number in self.stacked:
                self.stacks[part.number] = view[first : first + self.T]

    def _ring(self, number: int) -> RingBuffer:
        """The ring buffer from which a value is read."""
        ring = self.rings.get(number)
        if ring is None:
            assert number in self.stacks, number
            ring = self.rings[number] = RingBuffer(self.stacks[number], self.rows.step)
        return ring

    def _targets_of(self, number: int) -> list[RingBuffer]:
        """The ring buffers to which a computed value is written; readers use the first one."""
        rings = self.targets.get(number)
        if not rings:
            rings = self.targets[number] = [RingBuffer(self._empty(1, number), self.rows.zero)]
        self.rings[number] = rings[0]
        return rings

    def _argument(self, number: int) -> RingBuffer:
        """The ring buffer of a value, which may be the same at all iterations."""
        if number in self.invariants:
            return RingBuffer(self.invariants[number].unsqueeze(0), self.rows.zero)
        return self._ring(number)

    def _assembly(self, call: AtenCall, parts: Sequence[Part], out: RingBuffer) -> Assembly:
        copies = []
        if call.name not in JOINS:
            copies.append(Copy(RingBuffer(torch.zeros_like(out.tensor[:1]), self.rows.zero), out))
        for part in parts:
            copies.append(Copy(self._with_rows(part.number), out.viewed(part.of(out.tensor))))
        return Assembly(copies)

    def _with_rows(self, number: int) -> RingBuffer:
        """The ring buffer of a value; the rows of a given or constant value are made consecutive in memory."""
        ring = self._argument(number)
        is_given = ring.tensor is self.stacks.get(number) or number in self.invariants
        if not is_given or ring.tensor.dim() < 2 or ring.tensor.stride(-1) == 1:
            return ring
        copy = ring.tensor.contiguous()
        self.row_copies.append((copy, ring.tensor))
        return RingBuffer(copy, ring.rows)

    def _call(self, call: AtenCall) -> None:
        wanted = self.schedule.results_read(call)
        if not wanted:
            return
        if self.schedule.kinds.of(call) == "view" and self._view(call, wanted):
            return
        results = [self._targets_of(n) for n in wanted]
        if call.results[0] not in self.written_in_place:
            self.operations.append(self._operation(call, wanted, [r[0] for r in results]))
        for rings in results:
            self.operations += [Copy(rings[0], other) for other in rings[1:]]

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
                self.operations.append(Copy(self.rings[number], other))
        return True

    def _operation(self, call: AtenCall, wanted: Sequence[int], out: list[RingBuffer]) -> Operation:
        product = product_with_constant(call, self.values)
        term: Tensor | None
        if product is not None:
            left, matrix, bias = product
            term = None if bias is None else self.invariants[bias]
            return Product(self._with_rows(left), self.invariants[matrix], term, out[0])
        parts = parts_of(call, self.values)
        if parts:
            return self._assembly(call, parts, out[0])
        numbers = list(dict.fromkeys(call.references()))
        with_out = _WITH_OUT.get(call.name) if len(wanted) == 1 and not call.kwargs else None
        functional = FunctionalCall(call, wanted, self.recording)

        def write_out(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
            assert with_out is not None
            known = dict(zip(numbers, values, strict=True))
            with_out(*[resolve_references(a, known) for a in call.args], out=targets[0])

        def compute_and_copy(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
            results = functional.on(dict(zip(numbers, values, strict=True)))
            for result, target in zip(results, targets, strict=True):
                target.copy_(result)

        run = write_out if with_out is not None else compute_and_copy
        by_pytorch = Call(call.name, [self._argument(n) for n in numbers], run, out)
        found = convolution_with_constant(call, wanted, self.values)
        if found is None:
            return by_pytorch
        term = None if found.bias is None else self.invariants[found.bias]
        weight = self.invariants[found.weight]
        return Convolution(self._argument(found.input), weight, term, found.settings, out[0], by_pytorch)

    def _group(self, group: FusedGroup) -> None:
        """Add the launch of a kernel; the argument structs of its iterations differ only in addresses."""
        operands: list[tuple[Tensor, RingBuffer | None]] = []
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
            operands.append((ring.tensor, ring))
        described = []
        for tensor, location_of in operands:
            shape, stride, _ = describe_operand(tensor if location_of is None else tensor[0], False)
            drop = max(0, len(shape) - len(group.shape))
            described.append((shape[drop:], stride[drop:], False))
        layout = plan_layout(group.shape, tuple(range(len(group.shape))), tuple(described))
        if layout.elements:
            threads = (
                torch.get_num_threads() if layout.elements >= _MIN_PARALLEL_ELEMENTS and openmp() is not None else 1
            )
            words = pack_arguments(group.source, layout, 1, [(t.data_ptr(), 0.0) for t, _ in operands], threads)
            words_of = zip(address_words(group.source), operands, strict=True)
            addresses = [(word, ring) for word, (_, ring) in words_of if ring is not None]
            outputs = (slot.kind == "output" for slot in group.source.slots)
            written = [ring for is_output, (_, ring) in zip(outputs, operands, strict=True) if is_output and ring]
            self.operations.append(Launch(group, layout, words, addresses, written, [t for t, _ in operands]))

    def _operand(self, group: FusedGroup, index: int) -> Tensor:
        tensor = self.invariants[group.operands[index]]
        operand = tensor.to(operand_dtype(tensor.dtype)).resolve_neg()
        self.copies_given |= operand is not tensor
        return operand

    def _move_uncomputed_values(self) -> None:
        """Copy or sum the loop-carried, stored and summed values that no call of the loop computes."""
        made = {r for call in self.schedule.inside for r in call.results}
        for number, rings in self.targets.items():
            if number not in made:
                self.operations += [Copy(self._argument(number), ring) for ring in rings]
        fused = {n for stage in self.schedule.stages for group in stage.groups for n in group.added}
        for number, (read, write) in self.sums.items():
            if number not in fused:
                self.operations.append(Addition(self._argument(number), read, write))

    def stacks_of_loop(self) -> list[Tensor]:
        """The values that the loop writes for all steps, whose memory is written completely at each run."""
        found = [self.stacks[n] for n in self.schedule.stacked if n in self.stacks]
        carried = zip(self.schedule.goal.carried, self.carried, strict=True)
        found += [before.tensor for values, (before, _) in carried if values.read in self.stacked]
        fixed = {t.untyped_storage().data_ptr() for t in self.zeroed}
        return [t for t in found if t.untyped_storage().data_ptr() not in fixed]

    def result(self, unshared: Sequence[int], moved: Callable[[Tensor], Tensor] = where_it_is) -> PassResult:
        """Run the calls after the loop and collect the results.

        Args:
            unshared: stacks of the result that must not share memory with another tensor.
            moved: returns a tensor of the run at the place where the operations use it.
        """
        goal, schedule, known = self.schedule.goal, self.schedule, {n: moved(t) for n, t in self.stacks.items()}
        for k, (before, _) in enumerate(self.carried):
            read = goal.carried[k].read
            if read is not None and read in self.stacked:
                whole = moved(before.tensor)
                known[read] = whole[1:] if self.reverse else whole[:-1]
        run_batched(self.recording, schedule.after, schedule.results_read, known, self.invariants)
        stacks: dict[int, Tensor] = {}
        given = {*goal.given, *(c.read for c in goal.carried)}
        for number in goal.stacks:
            stack = known.get(number)
            if stack is None:
                value = self.invariants[number]
                stack = value.expand(self.T, *value.shape)
            own = self.stacks.get(number)
            is_shared = number in given or not any(ring.tensor is own for ring in self.targets.get(number, ()))
            stacks[number] = stack.clone() if number in unshared and is_shared else stack
        finals = [moved(final) for final in self.finals]
        return PassResult(stacks, {n: write.tensor[self.T % 2] for n, (_, write) in self.sums.items()}, finals)


_WITH_OUT: dict[str, Callable[..., Any]] = {
    "mm": torch.mm,
    "addmm": torch.addmm,
    "bmm": torch.bmm,
}
"""Operators that write their result to a given tensor."""
