"""Plan the recomputation of training, from the memory model of one net for inputs of one shape.

Each tile has one of four levels. Level 0: autograd saves its intermediates. Level 1: backward recomputes the tile from
its inputs, slice by slice. Level 2: backward also recomputes the products before the tile (matrix products and
convolutions), so their results are not saved. Level 3: backward computes these products twice, slice by slice, so their
whole results are never allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from snnfx.analysis.integer_ranges import infer_integer_ranges
from snnfx.emit.executable import Executable
from snnfx.emit.recompute_segments import RecomputePlan, segments_of
from snnfx.ir.facts import BATCH_DIM
from snnfx.memory.budget import CACHE_FRIENDLY
from snnfx.memory.memory_model import MemoryModel, model_memory
from snnfx.memory.timeline import Moment, state_bytes, training_peak
from snnfx.recompute.bit_packing import packed_bytes
from snnfx.recompute.tile import Slices

__all__ = ["SLICE", "TrainingPlanner", "packed_parts"]

SLICE = CACHE_FRIENDLY / 8
"""Bytes of one recomputed slice. Smaller slices need more calls and save little; larger ones are not faster."""

_BYTES_PER_SECOND = 3e9
_OPERATIONS_PER_SECOND = 3e10
"""Of one core. Only the ratio matters, for choosing the cheaper recomputation."""


def packed_parts(executable: Executable, model: MemoryModel, itemsize: int = 4) -> dict[int, float]:
    """For values that can be saved in packed form, the packed fraction of their bytes."""
    largest = {node.name: bound for node, bound in infer_integer_ranges(executable.program).largest.items()}
    bounds = ((value, largest.get(name)) for value, name in model.step_of.items())
    return {value: packed_bytes((1, 1, 64), bound) / (64 * itemsize) for value, bound in bounds if bound is not None}


class TrainingPlanner:
    """Makes recomputation plans for one number of time steps.

    Args:
        executable: in step mode "m".
        T: time steps.
        leaves: the inputs, time first; only their shapes and dtypes matter.
        state: the state before the first step.

    Raises:
        NotPredictable: see `model_memory`.
    """

    def __init__(
        self, executable: Executable, T: int, leaves: Sequence[Tensor], state: Mapping[str, Any] | None
    ) -> None:
        self.T = T
        inputs = zip(leaves, executable.varying_inputs, executable.program.input_nodes(), strict=True)
        batched = [x for x, v, node in inputs if v and x.dim() > 1 and BATCH_DIM.of(node) == 0]
        self.N = batched[0].shape[1] if batched else 1
        form = executable.recompute_form("main")
        self.tiles = form.tiles
        self.model = model_memory(executable, leaves, state, training=True, in_tiles=True)
        self.packed = packed_parts(executable, self.model, leaves[0].element_size() if leaves else 4)
        self.calls = {call.name: call for call in self.model.calls}
        self.index = {call.name: index for index, call in enumerate(self.model.calls)}
        self.costs = dict(zip(self.calls, self.model.costs(T), strict=True))
        self.sizes = [value(T) * self.packed.get(n, 1.0) for n, value in enumerate(self.model.values)]
        self.slice = SLICE
        self.light: dict[str, tuple[str, ...]] = {}
        self.full: dict[str, tuple[str, ...]] = {}
        grouped: set[str] = set()
        for name, (products, statistics) in segments_of(form.graph, form.tiles).items():
            if statistics or self._saves_more_than_inputs((name,)):
                self.light[name] = (*statistics, name)
            group = (*products, *statistics, name)
            if products and (statistics or self._saves_more_than_inputs(group)):
                self.full[name] = group
                grouped.update(group)
        for name, call in self.calls.items():
            # A product on its own that saves more than its inputs, e.g. attention.
            if (
                call.role == "product"
                and name in self.tiles
                and name not in grouped
                and self._saves_more_than_inputs((name,))
            ):
                self.full[name] = (name,)

    def peak(self, plan: RecomputePlan) -> Moment:
        """The peak of a training step under a plan."""
        return training_peak(self.model, self.T, plan, self.packed)

    @property
    def names(self) -> list[str]:
        """The tiles that can be recomputed."""
        return list(dict.fromkeys((*self.light, *self.full)))

    def levels_of(self, name: str) -> list[int]:
        """The levels that a tile can have."""
        with_products = ([2, 3] if self._can_slice_products(name) else [2]) if name in self.full else []
        return [0, *([1] if name in self.light else []), *with_products]

    # -- plans ------------------------------------------------------------------------------------------------------

    def selective(self) -> RecomputePlan:
        """Recompute everything except products."""
        return self.plan(dict.fromkeys(self.light, 1))

    def least(self) -> RecomputePlan:
        """Recompute everything, products twice where that lowers the peak."""
        levels = dict.fromkeys(self.light, 1) | dict.fromkeys(self.full, 2)
        plan = self.plan(levels)
        peak = self.peak(plan)
        while self._can_recompute_twice(peak, levels):
            other = self.plan(levels | {peak.name: 3})
            lower = self.peak(other)
            if lower.bytes > 0.98 * peak.bytes:
                break
            levels[peak.name], plan, peak = 3, other, lower
        return plan

    def within(self, budget: float) -> RecomputePlan:
        """A plan that fits the budget, or the plan with the lowest peak if none fits.

        Starts at level 0 and repeatedly raises the level of the tile that frees the most bytes at the peak per second
        of recomputation (a greedy knapsack). If no tile helps, slices shrink; large slices are a little faster. At the
        end, tiles whose recomputation is not needed return to level 0.
        """
        self.slice = 4 * SLICE
        levels: dict[str, int] = {}
        plan = best = self.plan(levels)
        peak = lowest = self.peak(plan)
        while peak.bytes > budget:
            name = self._best_candidate(peak, levels)
            if name is not None:
                levels[name] = self._next_level(name, levels)
            elif self.slice > SLICE / 64:
                self.slice /= 4
            else:
                break
            plan = self.plan(levels)
            peak = self.peak(plan)
            if peak.bytes < lowest.bytes:
                best, lowest = plan, peak
        return best if peak.bytes > budget else self._drop_unneeded(levels, budget)

    def _drop_unneeded(self, levels: dict[str, int], budget: float) -> RecomputePlan:
        for name in sorted(levels, key=lambda n: -self._seconds(self._group(n, levels[n]))):
            fewer = {n: level for n, level in levels.items() if n != name}
            if self.peak(self.plan(fewer)).bytes <= budget:
                levels = fewer
        plan = self.plan(levels)
        unpacked = replace(plan, packs=False)
        return unpacked if self.peak(unpacked).bytes <= budget else plan

    def plan(self, levels: Mapping[str, int]) -> RecomputePlan:
        """The plan with these tiles at these levels and all others at level 0."""
        ordered = sorted((n for n, level in levels.items() if level), key=self.index.__getitem__)
        groups = tuple(self._group(n, levels[n]) for n in ordered)
        slices = {group[-1]: self._slices(group) for group in groups}
        twice = frozenset(n for n in ordered if levels[n] == 3)
        return RecomputePlan(groups, {n: s for n, s in slices.items() if s != Slices()}, twice, packs=True)

    def _group(self, name: str, level: int) -> tuple[str, ...]:
        return self.full[name] if level > 1 else self.light[name]

    def _slices(self, group: Sequence[str]) -> Slices:
        """Slices of about `self.slice` bytes: of samples, and of time steps if one sample needs more."""
        tiles = [self.tiles[name] for name in group if name in self.tiles]
        costs = [self.calls[name].bytes for name in group if name in self.tiles]
        # Sizes that do not grow with the steps, such as the gradient of a weight, are the same in each slice.
        needed = self.T * sum(c["saved"].per_step + c["backward"].per_step for c in costs)
        samples, steps, share = None, None, 1.0
        if needed > self.slice and self.N > 1 and all(tile.by_samples for tile in tiles):
            # The fewest slices, all of about one size. None has a single sample, which `F.group_norm` may refuse.
            samples = max(2, math.ceil(self.N / math.ceil(needed / self.slice)))
            while self.N % samples == 1:
                samples += 1
            share = samples / self.N
        if needed * share > 2 * self.slice and self.T > 1 and all(tile.by_steps for tile in tiles):
            # Slices of k steps save T / k states and allocate k steps: the sum is smallest at the root of their ratio.
            per_step = max(1.0, needed / self.T)
            least = math.sqrt(self.T * state_bytes(self.model, self.calls[group[-1]]) / per_step)
            steps = max(1, round(max(least, self.slice / (per_step * share))))
        steps = steps if steps is not None and steps < self.T else None
        samples = samples if samples is not None and samples < self.N else None
        return Slices(samples, steps, self.N if samples is not None else 0)

    # -- costs and benefits -----------------------------------------------------------------------------------------

    def _next_level(self, name: str, levels: Mapping[str, int]) -> int:
        level = levels.get(name, 0) + 1
        return 2 if level == 1 and name not in self.light else level

    def _best_candidate(self, peak: Moment, levels: Mapping[str, int]) -> str | None:
        best, name = 0.0, None
        for candidate in self.names:
            level = self._next_level(candidate, levels)
            if level > (2 if candidate in self.full else 1) and not (
                candidate == peak.name and self._can_recompute_twice(peak, levels)
            ):
                continue
            freed = self._freed(candidate, levels.get(candidate, 0), level, peak)
            before = self._group(candidate, levels[candidate]) if candidate in levels else ()
            more = [n for n in self._group(candidate, level) if n not in before or level == 3]
            rate = freed / (self._seconds(more) + 1e-5)
            if rate > best and freed > 0.001 * peak.bytes:
                best, name = rate, candidate
        return name

    def _freed(self, name: str, before: int, after: int, peak: Moment) -> float:
        """Bytes that raising the level of a tile frees at the peak."""
        own_index, peak_index = self.index[name], self.index.get(peak.name, 0)
        products = sum(self._size(v) for n in self._group(name, after)[:-1] for v in self.calls[n].makes)
        if own_index == peak_index and peak.phase == "backward":
            if after == 1:
                return self.costs[name]["saved"] + self.costs[name]["backward"] - self.slice
            # Level 2 alone frees nothing here: its recomputed products replace the saved ones.
            return products if self._can_slice_products(name) else 0.0
        # Tensors of later calls are not allocated at the peak.
        return self._saved(name, before) - self._saved(name, after) if own_index <= peak_index else 0.0

    def _saved(self, name: str, level: int) -> float:
        """Bytes that a tile and the products before it save for backward."""
        products = [n for n in self.full.get(name, ()) if n != name and n in self.tiles]
        if level > 1:
            inner = {v for n in self.full[name] for v in self.calls[n].makes}
            return sum(self._size(v) for v in {v for n in self.full[name] for v in self.calls[n].reads} - inner)
        values = {v for n in products for v in self.calls[n].saves}
        tile = self.calls[name]
        values |= set(tile.saves if level == 0 else tile.reads)
        own = sum(self.costs[n]["saved"] for n in (*products, *((name,) if level == 0 else ())))
        return own + sum(map(self._size, values))

    def _can_recompute_twice(self, peak: Moment, levels: Mapping[str, int]) -> bool:
        """Whether backward can compute the products of the tile at the peak twice."""
        return peak.phase == "backward" and levels.get(peak.name) == 2 and self._can_slice_products(peak.name)

    def _can_slice_products(self, name: str) -> bool:
        """Whether a tile and the products before it can run on the same slices, with statistics between them."""
        group = self.full.get(name, ())
        tiles = [self.tiles[n] for n in group if n in self.tiles]
        is_cut = all(tile.by_samples for tile in tiles) or all(tile.by_steps for tile in tiles)
        return is_cut and 1 < len(tiles) < len(group)

    def _saves_more_than_inputs(self, group: Sequence[str]) -> bool:
        """Whether autograd saves more for some calls than the bytes of their inputs."""
        calls = [self.calls[name] for name in group]
        outputs = {v for call in calls for v in call.makes}
        values = {v for call in calls for v in call.saves}
        saved = sum(self.costs[name]["saved"] for name in group) + sum(map(self._size, values))
        inputs = {v for call in calls for v in call.reads if v not in outputs}
        return saved > 1.01 * sum(map(self._size, inputs))

    def _size(self, value: int) -> float:
        """Bytes of a value when it is saved for backward."""
        return self.sizes[value]

    def _seconds(self, names: Sequence[str]) -> float:
        """The estimated run time of some calls, for comparison only."""
        costs = [self.costs[name] for name in names]
        return sum(c["written"] / _BYTES_PER_SECOND + c["operations"] / _OPERATIONS_PER_SECOND for c in costs)
