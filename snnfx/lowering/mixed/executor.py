"""Runs the schedule of a pass over the time steps, without autograd and with all memory laid out beforehand.

Every value that leaves a kernel or a call has a ring: a tensor `[P, *]`, of which each step uses one place. What is
kept has a place for each step, what goes to the next step two, everything else one. So all addresses are known before
the loop, and a step is a few calls with views and addresses that are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, Recording, ValueReference
from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.elementwise.cpp.cpp_launch import address_words, pack_arguments
from snnfx.lowering.elementwise.operand_layout import dense_strides, description, plan_layout
from snnfx.lowering.mixed.batched_calls import run_batched
from snnfx.lowering.mixed.call_kinds import Pure, resolved
from snnfx.lowering.mixed.fused_group import FusedGroup
from snnfx.lowering.mixed.schedule import Schedule
from snnfx.ops.buffer_pool import pool

__all__ = ["Result", "run_schedule"]

_FEW = 1 << 14
"""Elements of a step up to which a second thread does not pay."""

_STRUCTS = 1024
"""Iterations for which the arguments of a kernel are made at once."""


class Ring:
    """A value at the places that the steps use.

    Args:
        tensor: `[P, *]`.
        places: for each iteration, which place it uses.
    """

    def __init__(self, tensor: Tensor, places: Sequence[int]) -> None:
        self.tensor, self.places = tensor, places
        self._steps: list[Tensor] | None = None

    def steps(self) -> list[Tensor]:
        """The value of each iteration, a view."""
        if self._steps is None:
            each = self.tensor.unbind(0)
            self._steps = [each[k] for k in self.places]
        return self._steps

    def viewed(self, tensor: Tensor) -> Ring:
        """The same places of another tensor `[P, *]`."""
        return Ring(tensor, self.places)


class Result:
    """What a pass leaves.

    Args:
        stacks: the values that were wanted at all steps, `[T, *]`.
        sums: those whose sum was wanted.
        finals: the carried values after the last step, in the order of the schedule.
        rings: for each carried value that was kept, its values before all steps and after the last one, `[T + 1, *]`.
    """

    def __init__(
        self, stacks: dict[int, Tensor], sums: dict[int, Tensor], finals: list[Tensor], rings: dict[int, Tensor]
    ) -> None:
        self.stacks, self.sums, self.finals, self.rings = stacks, sums, finals, rings


def run_schedule(
    schedule: Schedule,
    T: int,
    stacks: dict[int, Tensor],
    invariants: dict[int, Tensor],
    initial: Sequence[Tensor | float],
    reverse: bool,
    own: Sequence[int] = (),
) -> Result:
    """Run a pass.

    Args:
        schedule: of the pass.
        T: the number of steps.
        stacks: what is at hand, `[T, *]` each.
        invariants: what does not change with time.
        initial: carried values before the first iteration: numbers, or what can be expanded to a step.
        reverse: go through time backwards.
        own: wanted stacks that have to be tensors of their own.
    """
    with torch.no_grad():
        return _ScheduleRun(schedule, T, dict(stacks), invariants, initial, reverse).result(own)


class _ScheduleRun:
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
        self.rings: dict[Any, Ring] = {}
        self.targets: dict[int, list[Ring]] = {}
        self.alive: list[Any] = []
        self.keep = set(schedule.kept)
        self.carried = [self._carry(k, value) for k, value in enumerate(initial)]
        self.sums = {n: self._sum_ring(n) for n in schedule.goal.sums}
        for number in schedule.kept:
            if number not in self.rings:
                self._keep(number)
        self.operations: list[Callable[[int], None]] = []
        for stage in schedule.stages:
            for call in stage.calls:
                self._call(call)
            for group in stage.groups:
                self._group(group)
        self._rest()
        for i in range(T):
            for operation in self.operations:
                operation(i)

    # -- memory -----------------------------------------------------------------------------------------------------

    def _empty(self, count: int, number: int) -> Tensor:
        value = self.values[number]
        shape = (count, *value.shape)
        return pool.empty(shape, dense_strides(shape, range(len(shape))), value.dtype)

    def _carry(self, k: int, initial: Tensor | float) -> tuple[Ring, Ring]:
        """The rings from which a carried value is read and to which the next one is written."""
        carried = self.schedule.goal.carried[k]
        number = carried.following if carried.following is not None else carried.read
        assert number is not None
        T = self.T
        if carried.following is None:
            ring = self._empty(2, number).zero_()
            read, write = [0] + [1] * (T - 1), [1] * T
        elif carried.read in self.keep:
            ring, later = self._empty(T + 1, number), [t + 1 for t in self.order]
            read, write = (later, self.order) if self.reverse else (self.order, later)
        else:
            ring = self._empty(2, number)
            read, write = [i % 2 for i in range(T)], [(i + 1) % 2 for i in range(T)]
        if isinstance(initial, Tensor):
            ring[read[0]].copy_(initial)
        else:
            ring[read[0]].fill_(initial)
        before, after = Ring(ring, read), Ring(ring, write)
        if carried.read is not None:
            self.rings[carried.read] = before
        if carried.following is not None:
            self.targets.setdefault(carried.following, []).append(after)
        return before, after

    def _sum_ring(self, number: int) -> tuple[Ring, Ring]:
        ring = self._empty(2, number)
        ring[0].zero_()
        read, write = [i % 2 for i in range(self.T)], [(i + 1) % 2 for i in range(self.T)]
        self.rings["sum", number] = Ring(ring, read)
        return self.rings["sum", number], Ring(ring, write)

    def _keep(self, number: int) -> None:
        self.targets.setdefault(number, []).append(Ring(self._empty(self.T, number), self.order))
        self.stacks[number] = self.targets[number][-1].tensor

    def _ring(self, number: int) -> Ring:
        """Where a value is read from."""
        ring = self.rings.get(number)
        if ring is None:
            assert number in self.stacks, number
            ring = self.rings[number] = Ring(self.stacks[number], self.order)
        return ring

    def _written(self, number: int) -> list[Ring]:
        """Where a computed value is written; the first place is where it is read from."""
        rings = self.targets.get(number)
        if not rings:
            rings = self.targets[number] = [Ring(self._empty(1, number), [0] * self.T)]
        self.rings[number] = rings[0]
        return rings

    # -- the operations of a step -----------------------------------------------------------------------------------

    def _argument(self, argument: Any) -> Any:
        """For a tensor the list of its values at all iterations."""
        if argument.number in self.invariants:
            return [self.invariants[argument.number]] * self.T
        return self._ring(argument.number).steps()

    def _call(self, call: AtenCall) -> None:
        wanted = self.schedule.results_read(call)
        if not wanted:
            return
        if self.schedule.kinds.of(call) == "view" and self._view(call, wanted):
            return
        results = [self._written(n) for n in wanted]
        if call.name in _WITH_OUT and len(wanted) == 1 and not call.kwargs:
            self.operations.append(self._into(call, results[0][0].steps()))
        else:
            self.operations.append(self._copied(call, wanted, [r[0].steps() for r in results]))
        for rings in results:
            for other in rings[1:]:
                self.operations.append(_copier(rings[0].steps(), other.steps()))

    def _view(self, call: AtenCall, wanted: Sequence[int]) -> bool:
        """A view of a ring is a ring: it is made once, for all steps."""
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

    def _into(self, call: AtenCall, out: list[Tensor]) -> Callable[[int], None]:
        """A call that writes into its place."""
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

    def _copied(self, call: AtenCall, wanted: Sequence[int], out: list[list[Tensor]]) -> Callable[[int], None]:
        """Any other call, its results copied into their places."""
        pure = Pure(call, wanted, self.recording)
        numbers = {r: self._argument(ValueReference(r)) for r in dict.fromkeys(call.references())}

        def compute(i: int) -> None:
            known = {number: steps[i] for number, steps in numbers.items()}
            results = pure([resolved(a, known) for a in pure.args], resolved(call.kwargs, known))
            for result, steps in zip(results, out, strict=True):
                steps[i].copy_(result)

        return compute

    def _group(self, group: FusedGroup) -> None:
        """A kernel: a table with the struct of arguments of each iteration, of which only addresses differ."""
        operands: list[tuple[Tensor, Sequence[int] | None]] = []
        places_left: dict[int, list[Ring]] = {}
        for slot in group.source.slots:
            if slot.kind == "operand":
                operands.append((self._operand(group, slot.index), None))
                continue
            place = group.read_location(slot.index) if slot.kind == "sequence" else group.write_location(slot.index)
            if isinstance(place, tuple):
                ring = self.sums[place[1]][0 if slot.kind == "sequence" else 1]
            elif slot.kind == "sequence":
                ring = self._ring(place)
            else:
                if place not in places_left:
                    places_left[place] = list(self._written(place))
                ring = places_left[place].pop(0)
            operands.append((ring.tensor, ring.places))
        described = []
        for tensor, places in operands:
            shape, stride, _ = description(tensor if places is None else tensor[0], False)
            drop = max(0, len(shape) - len(group.shape))
            described.append((shape[drop:], stride[drop:], False))
        layout = plan_layout(group.shape, tuple(range(len(group.shape))), tuple(described))
        if layout.elements:
            threads = torch.get_num_threads() if layout.elements >= _FEW and openmp() is not None else 1
            words = pack_arguments(group.source, layout, 1, [(t.data_ptr(), 0.0) for t, _ in operands], threads)
            addresses = {
                word: (tensor.data_ptr(), tensor.stride(0) * tensor.element_size(), places)
                for word, (tensor, places) in zip(address_words(group.source), operands, strict=True)
                if places is not None
            }
            self.alive += [tensor for tensor, _ in operands]
            self.operations.append(_launcher(group, words, addresses, self.T))

    def _operand(self, group: FusedGroup, index: int) -> Tensor:
        tensor = self.invariants[group.operands[index]]
        tensor = tensor if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor.double()
        return tensor.resolve_neg()

    def _rest(self) -> None:
        """What nothing computes in the loop but is carried, kept or added up."""
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

    # -- what is left -----------------------------------------------------------------------------------------------

    def result(self, own: Sequence[int]) -> Result:
        """The wanted values."""
        goal, T = self.schedule.goal, self.T
        rings = {k: before.tensor for k, (before, _) in enumerate(self.carried) if goal.carried[k].read in self.keep}
        for k, tensor in rings.items():
            read = goal.carried[k].read
            assert read is not None
            self.stacks[read] = tensor[1:] if self.reverse else tensor[:-1]
        schedule = self.schedule
        run_batched(self.recording, schedule.after, schedule.results_read, self.stacks, self.invariants)
        stacks: dict[int, Tensor] = {}
        given = {*goal.at_hand, *(c.read for c in goal.carried)}
        for number in goal.stacks:
            found = self.stacks.get(number)
            if found is None:
                value = self.invariants[number]
                found = value.expand(T, *value.shape)
            stacks[number] = found.clone() if number in own and (number in given or not self._is_own(number)) else found
        sums = {n: write.tensor[T % 2] for n, (_, write) in self.sums.items()}
        finals = [after.tensor[after.places[-1]] for _, after in self.carried]
        return Result(stacks, sums, finals, rings)

    def _is_own(self, number: int) -> bool:
        """Whether the stack of a value was made for it alone."""
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
    """Launch a kernel at each iteration, with structs of arguments that are made for many iterations at once.

    Args:
        group: the kernel.
        words: the struct.
        addresses: of its words that differ between iterations: address of place 0, bytes of a place, places.
        T: the number of iterations.
    """
    run = load(group.source).run
    count = min(T, _STRUCTS)
    table = torch.tensor(words, dtype=torch.int64).repeat(count, 1)
    start, step = table.data_ptr(), table.stride(0) * table.element_size()

    def launch(i: int) -> None:
        row = i % count
        if row == 0:
            for word, (address, size, places) in addresses.items():
                part = torch.tensor(places[i : i + count], dtype=torch.int64)
                table[: len(part), word] = part * size + address
        run(start + row * step)

    return launch
