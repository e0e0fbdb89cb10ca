"""Run a schedule, and keep small runs to repeat them with new values.

Allocating the ring buffers of a run and building its operations takes longer than the loop itself if a net is small. A
run is therefore kept. A compiled loop that is repeated reads the given tensors and writes the results where they are
(`snnfx.lowering.mixed.relocation`). Steps that Python code runs have views of the tensors of the run: the next call
writes its values to these tensors and copies the results, so only small tensors are worth it. Parameters stay at their
addresses from call to call, so a run reads them and their views directly. A run is taken out while it is in use, so
that several threads and nested calls never share one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.mixed.batched_calls import run_batched
from snnfx.lowering.mixed.executor import ScheduleRun
from snnfx.lowering.mixed.pass_result import PassResult, where_it_is
from snnfx.lowering.mixed.relocation import Relocation, start_of
from snnfx.lowering.mixed.schedule import Schedule
from snnfx.ops.buffer_pool import pool
from snnfx.sandbox.torch_internals import dispatch_mode_count

__all__ = ["run_schedule"]

_MOST_BYTES = 1 << 21
"""Bytes of the given tensors up to which copying them takes less time than building a run."""

_LEAST_MOVED_BYTES = 1 << 17
"""Bytes of the given tensors of a compiled loop from which copying them takes longer than changing addresses."""

_MOST_BYTES_OF_LOOP = 1 << 23
"""Bytes of the given tensors of a compiled loop from which on building a run takes a small part of its time.

The memory of larger runs is missing in the pool of buffers.
"""

_KEPT = 4
"""Runs that a schedule keeps, for different shapes."""

_MOST_UNREPEATABLE = 64
"""Keys of runs that cannot be repeated that a schedule remembers, so that none is built to be kept again."""

_KEPT_BYTES = 1 << 26
"""Memory of all kept runs of the process; beyond it, no run is kept."""

Key = tuple[Any, ...]


def run_schedule(
    schedule: Schedule,
    T: int,
    stacks: dict[int, Tensor],
    invariants: dict[int, Tensor],
    initial: Sequence[Tensor | float],
    reverse: bool,
    unshared: Sequence[int] = (),
    constants: Sequence[Tensor] = (),
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
        constants: tensors whose memory a kept run may read in later calls, at the same addresses.
    """
    with torch.no_grad():
        key = _key(T, stacks, invariants, reverse, schedule.reason_for_python == "")
        kept: dict[Key, BoundRun | None] = schedule.kept_runs
        bound: BoundRun | None
        if key is None or key in schedule.unrepeatable_runs or dispatch_mode_count():
            bound = None
        elif key in kept:
            bound = kept.pop(key, None)
            moved = frozenset[int]() if bound is None else bound.moved(invariants)
            if moved:
                bound = None
            if bound is None and memory.has_room:
                bound = BoundRun(schedule, T, stacks, invariants, len(initial), reverse, constants, moved)
            if bound is not None and not bound.can_be_repeated:
                if len(schedule.unrepeatable_runs) >= _MOST_UNREPEATABLE:
                    schedule.unrepeatable_runs.clear()
                schedule.unrepeatable_runs.add(key)
                bound = None
        else:
            bound = None
            _keep(kept, key, None)  # the second call with this key builds a run
        if bound is None:
            run = ScheduleRun(schedule, T, dict(stacks), invariants, len(initial), reverse)
            run.run(initial)
            return run.result(unshared)
        result = bound.repeat(stacks, invariants, initial, unshared)
        assert key is not None
        _keep(kept, key, bound)
        return result


def _keep(kept: dict[Key, BoundRun | None], key: Key, run: BoundRun | None) -> None:
    kept[key] = run
    for oldest in [*kept][:-_KEPT]:  # a list, since other threads change the dict
        kept.pop(oldest, None)


def _key(
    T: int, stacks: dict[int, Tensor], invariants: dict[int, Tensor], reverse: bool, is_compiled: bool
) -> Key | None:
    """The properties of the given tensors on which a run depends; None if they are too large."""
    total = 0
    described: list[object] = [T, reverse, torch.get_num_threads()]
    for values in (stacks, invariants):
        for number, tensor in values.items():
            total += tensor.nbytes if tensor.is_contiguous() else _extent(tensor)
            described += (number, tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg())
    return tuple(described) if total <= (_MOST_BYTES_OF_LOOP if is_compiled else _MOST_BYTES) else None


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element of a tensor, at least those of its elements."""
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return max(tensor.nbytes, (sum(steps) + 1) * tensor.element_size())


class KeptMemory:
    """Counts the memory of the kept runs."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.RLock()  # the end of a run may come in the middle of any line

    @property
    def has_room(self) -> bool:
        """Whether another run may be kept."""
        return self.bytes < _KEPT_BYTES

    def count(self, run: BoundRun) -> None:
        """Count the memory of a run until it ends."""
        tensors = [ring.tensor for rings in run.run.targets.values() for ring in rings]
        tensors += [ring.tensor for ring in run.run.rings.values()]
        tensors += [*run.stacks.values(), *run.copied.values(), *(copy for copy, _ in run.run.row_copies)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self._add(sum(storages.values()))
        weakref.finalize(run, self._add, -sum(storages.values())).atexit = False

    def _add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


memory = KeptMemory()


class BoundRun:
    """A run on tensors of its own, which can be repeated.

    Args:
        schedule, T, stacks, invariants, reverse, constants: as for `run_schedule`.
        carried: the number of loop-carried values.
        moving: invariants whose address changes, so that they are copied even if they are views of constants.

    Attributes:
        can_be_repeated: whether all operations read the given tensors themselves, and no large tensor is copied.
        copied: the invariants that each call writes to tensors of the run.
        relocation: the addresses of the given tensors and results in a compiled loop; None for Python code, which
            reads copies of the given tensors.
    """

    def __init__(
        self,
        schedule: Schedule,
        T: int,
        stacks: dict[int, Tensor],
        invariants: dict[int, Tensor],
        carried: int,
        reverse: bool,
        constants: Sequence[Tensor] = (),
        moving: frozenset[int] = frozenset(),
    ) -> None:
        self.schedule, self._moving = schedule, moving
        moves = schedule.reason_for_python == "" and sum([t.nbytes for t in stacks.values()]) >= _LEAST_MOVED_BYTES
        fixed = {start_of(t) for t in constants}
        shared = {n: t for n, t in invariants.items() if n not in moving and start_of(t) in fixed}
        self._addresses = {n: t.data_ptr() for n, t in shared.items()}
        with torch.inference_mode(False):
            self.stacks = {n: _stand_in(t) if moves else _own(t) for n, t in stacks.items()}
            self.copied = {n: _own(t) for n, t in invariants.items() if n not in shared}
            self.invariants = {n: shared[n] if n in shared else self.copied[n] for n in invariants}
            _write(self.copied, invariants)
            self.run = ScheduleRun(schedule, T, dict(self.stacks), self.invariants, carried, reverse)
        memory.count(self)
        given_memory = {start_of(t) for t in (*self.stacks.values(), *self.invariants.values())}
        self.computed = {
            number: stack
            for number, stack in self.run.stacks.items()
            if number in schedule.made_before and start_of(stack) not in given_memory
        }
        self._views: PassResult | None = None
        """The results as views of the memory of the run; None if each repetition computes or moves some of them."""
        self.relocation: Relocation | None = None
        self._made: list[Tensor] = []
        if moves and not self.run.reason_for_python:
            given_memory.update(map(start_of, self.computed.values()))
            made = {start_of(t): t for t in sorted(self.run.stacks_of_loop(), key=Tensor.numel)}
            self._made = [t for start, t in made.items() if start and start not in given_memory]
            self.relocation = self.run.compiled.relocation(
                (*self.stacks.values(), *self.computed.values(), *self._made)
            )
        to_copy = [*self.copied.values(), *(() if self.relocation else self.stacks.values())]
        self.can_be_repeated = (
            not self.run.copies_given
            and moves == (self.relocation is not None)
            and sum([t.nbytes for t in to_copy]) <= _MOST_BYTES
        )
        rings = (*self.run.rings.values(), *(ring for rings in self.run.targets.values() for ring in rings))
        self._memory = given_memory.union(start_of(ring.tensor) for ring in rings)
        """The addresses of all storages of the run."""

    def _is_in_memory_of_run(self, result: PassResult) -> bool:
        return self._memory.issuperset(map(start_of, (*result.stacks.values(), *result.sums.values())))

    def moved(self, invariants: dict[int, Tensor]) -> frozenset[int]:
        """The invariants whose address changes if some are no longer where the run reads them; else none."""
        moved = [n for n, address in self._addresses.items() if invariants[n].data_ptr() != address]
        return self._moving.union(moved) if moved else frozenset()

    def repeat(
        self,
        stacks: dict[int, Tensor],
        invariants: dict[int, Tensor],
        initial: Sequence[Tensor | float],
        unshared: Sequence[int],
    ) -> PassResult:
        """Run the pass with other values; the results share no memory with the run."""
        _write(self.copied, invariants)
        relocation = self.relocation
        if relocation is None:
            _write(self.stacks, stacks)
            self._compute(self.stacks)
            return self._repeat(initial, where_it_is, unshared)
        for number, tensor in stacks.items():
            relocation.move(self.stacks[number], tensor)
        self._compute(stacks)
        for tensor in self._made:
            relocation.move(tensor, _new(tensor))
        try:
            return self._repeat(initial, relocation.of, unshared)
        finally:
            relocation.release()

    def _compute(self, stacks: dict[int, Tensor]) -> None:
        """Run the calls before the loop."""
        if not self.computed:
            return
        known, schedule = dict(stacks), self.schedule
        run_batched(schedule.recording, schedule.before, schedule.results_read, known, self.invariants)
        for number, own in self.computed.items():
            found = known[number]
            if self.relocation is None:
                own.copy_(found)
            else:
                self.relocation.move(own, found if found.stride() == own.stride() else own.copy_(found))

    def _repeat(
        self, initial: Sequence[Tensor | float], moved: Callable[[Tensor], Tensor], unshared: Sequence[int]
    ) -> PassResult:
        for copy, source in self.run.row_copies:
            copy.copy_(moved(source))
        self.run.run(initial, moved)
        result = self.run.result(unshared, moved) if self._views is None else self._views
        if self.relocation is None and self._views is None and self._is_in_memory_of_run(result):
            self._views = result
        copies: dict[int, Tensor] = {}
        for t in (*result.stacks.values(), *result.sums.values()):
            if id(t) not in copies:
                copies[id(t)] = t.clone() if start_of(t) in self._memory else t
        return PassResult(
            {n: copies[id(t)] for n, t in result.stacks.items()},
            {n: copies[id(t)] for n, t in result.sums.items()},
            [final.clone() for final in result.finals],
            is_unshared=True,
        )


def _new(stand_in: Tensor) -> Tensor:
    """New memory for a storage, viewed as its stand-in."""
    if stand_in.nbytes == stand_in.untyped_storage().nbytes():
        return pool.empty(stand_in.shape, stand_in.stride(), stand_in.dtype)
    count = stand_in.untyped_storage().nbytes() // stand_in.element_size()
    return pool.empty((count,), (1,), stand_in.dtype).as_strided(
        stand_in.shape, stand_in.stride(), stand_in.storage_offset()
    )


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor with the same strides, whose elements are never read or written."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _own(tensor: Tensor) -> Tensor:
    """A dense tensor in the memory order of another one; dimensions along which that one is expanded are expanded."""
    one = tensor[tuple(slice(1) if s == 0 else slice(None) for s in tensor.stride())]
    return torch.empty_like(one).expand(tensor.shape)


def _write(own: dict[int, Tensor], given: dict[int, Tensor]) -> None:
    for number, tensor in own.items():
        source = given[number]
        if 0 in tensor.stride():
            index = tuple(slice(1) if s == 0 else slice(None) for s in tensor.stride())
            tensor, source = tensor[index], source[index]
        tensor.copy_(source)
