"""Plans of what backward computes again, from the memory model of one net for inputs of one shape.

A tile is at one of four levels. At level 0 it keeps its history. At level 1 it is computed again, slice by slice,
from what goes into it. At level 2 the products in front of it are computed again as well, so that their results are
not kept. At level 3 they are computed two times in backward, slice by slice, so that their results are never there as
a whole.
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
from snnfx.memory.budget import CACHE_FRIENDLY
from snnfx.memory.memory_model import MemoryModel, model_memory
from snnfx.memory.timeline import Moment, state_bytes, training_peak
from snnfx.recompute.bit_packing import packed_bytes
from snnfx.recompute.tile import Slices

__all__ = ["SLICE", "TrainingPlanner", "packed_parts"]

SLICE = CACHE_FRIENDLY / 8
"""Bytes of a slice of what is computed again. Smaller ones cost calls and save little; larger ones are no faster."""

_BYTES_PER_SECOND = 3e9
_OPERATIONS_PER_SECOND = 3e10
"""One core; only their ratio matters, for what is cheaper to compute again."""


def packed_parts(executable: Executable, model: MemoryModel, itemsize: int = 4) -> dict[int, float]:
    """For values that can be kept packed, the part of their bytes that this takes."""
    largest = {node.name: bound for node, bound in infer_integer_ranges(executable.program).largest.items()}
    bounds = ((value, largest.get(name)) for value, name in model.step_of.items())
    return {value: packed_bytes((1, 1, 64), bound) / (64 * itemsize) for value, bound in bounds if bound is not None}


class TrainingPlanner:
    """Makes plans for one number of steps.

    Args:
        executable: in step mode "m".
        T: time steps.
        leaves: the inputs, time first; only shapes are looked at.
        state: the state before the first step.

    Raises:
        NotPredictable: as `model_memory`.
    """

    def __init__(
        self, executable: Executable, T: int, leaves: Sequence[Tensor], state: Mapping[str, Any] | None
    ) -> None:
        self.T = T
        inputs = zip(leaves, executable.varying_inputs, executable.program.input_nodes(), strict=True)
        batched = [x for x, v, node in inputs if v and x.dim() > 1 and node.meta.get("batch_dim") == 0]
        self.N = batched[0].shape[1] if batched else 1
        form = executable.recompute_form("main")
        self.tiles = form.tiles
        self.model = model_memory(executable, leaves, state, training=True, in_tiles=True)
        self.packed = packed_parts(executable, self.model, leaves[0].element_size() if leaves else 4)
        self.calls = {call.name: call for call in self.model.calls}
        self.place = {call.name: index for index, call in enumerate(self.model.calls)}
        self.costs = dict(zip(self.calls, self.model.costs(T), strict=True))
        self.sizes = [value(T) * self.packed.get(n, 1.0) for n, value in enumerate(self.model.values)]
        self.slice = SLICE
        self.light: dict[str, tuple[str, ...]] = {}
        self.full: dict[str, tuple[str, ...]] = {}
        taken: set[str] = set()
        for name, (products, statistics) in segments_of(form.graph, form.tiles).items():
            if statistics or self._holds_more((name,)):
                self.light[name] = (*statistics, name)
            group = (*products, *statistics, name)
            if products and (statistics or self._holds_more(group)):
                self.full[name] = group
                taken.update(group)
        for name, call in self.calls.items():
            # A product by itself that holds more than what goes in, e.g. attention.
            if call.role == "product" and name in self.tiles and name not in taken and self._holds_more((name,)):
                self.full[name] = (name,)

    def peak(self, plan: RecomputePlan) -> Moment:
        """The widest point of a training step under a plan."""
        return training_peak(self.model, self.T, plan, self.packed)

    @property
    def names(self) -> list[str]:
        """The tiles that can be computed again."""
        return list(dict.fromkeys((*self.light, *self.full)))

    def levels_of(self, name: str) -> list[int]:
        """The levels at which a tile can be."""
        with_products = ([2, 3] if self._can_be_cut(name) else [2]) if name in self.full else []
        return [0, *([1] if name in self.light else []), *with_products]

    # -- plans ------------------------------------------------------------------------------------------------------

    def selective(self) -> RecomputePlan:
        """Everything but products is computed again."""
        return self.plan(dict.fromkeys(self.light, 1))

    def least(self) -> RecomputePlan:
        """Everything is computed again; products two times where that lowers the peak."""
        levels = dict.fromkeys(self.light, 1) | dict.fromkeys(self.full, 2)
        plan = self.plan(levels)
        peak = self.peak(plan)
        while self._can_be_twice(peak, levels):
            other = self.plan(levels | {peak.name: 3})
            lower = self.peak(other)
            if lower.bytes > 0.98 * peak.bytes:
                break
            levels[peak.name], plan, peak = 3, other, lower
        return plan

    def within(self, budget: float) -> RecomputePlan:
        """A plan that fits the budget, or else the best that was found.

        From level 0 on, what frees most bytes at the peak for the time that it takes goes up a level (a greedy
        knapsack). When nothing there can, slices get smaller; large ones are a little faster. What turns out not to be
        needed is put back.
        """
        self.slice = 4 * SLICE
        levels: dict[str, int] = {}
        plan = best = self.plan(levels)
        peak = lowest = self.peak(plan)
        while peak.bytes > budget:
            name = self._most_worth(peak, levels)
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
        return best if peak.bytes > budget else self._without_the_needless(levels, budget)

    def _without_the_needless(self, levels: dict[str, int], budget: float) -> RecomputePlan:
        for name in sorted(levels, key=lambda n: -self._seconds(self._group(n, levels[n]))):
            fewer = {n: level for n, level in levels.items() if n != name}
            if self.peak(self.plan(fewer)).bytes <= budget:
                levels = fewer
        plan = self.plan(levels)
        unpacked = replace(plan, packs=False)
        return unpacked if self.peak(unpacked).bytes <= budget else plan

    def plan(self, levels: Mapping[str, int]) -> RecomputePlan:
        """The plan with these tiles at these levels, all others at level 0."""
        ordered = sorted((n for n, level in levels.items() if level), key=self.place.__getitem__)
        groups = tuple(self._group(n, levels[n]) for n in ordered)
        slices = {group[-1]: self._slices(group) for group in groups}
        twice = frozenset(n for n in ordered if levels[n] == 3)
        return RecomputePlan(groups, {n: s for n, s in slices.items() if s != Slices()}, twice, packs=True)

    def _group(self, name: str, level: int) -> tuple[str, ...]:
        return self.full[name] if level > 1 else self.light[name]

    def _slices(self, group: Sequence[str]) -> Slices:
        """Slices of about so many bytes: of samples, and of time where one sample takes more."""
        tiles = [self.tiles[name] for name in group if name in self.tiles]
        costs = [self.calls[name].bytes for name in group if name in self.tiles]
        # What does not grow with the steps, such as the gradient of a weight, is in each slice.
        needed = self.T * sum(c["saved"].per_step + c["backward"].per_step for c in costs)
        samples, steps, share = None, None, 1.0
        if needed > self.slice and self.N > 1 and all(tile.by_samples for tile in tiles):
            # As many slices as it takes, all of about one size.
            count = min(self.N, math.ceil(needed / self.slice))
            samples = math.ceil(self.N / count)
            share = samples / self.N
        if needed * share > 2 * self.slice and self.T > 1 and all(tile.by_steps for tile in tiles):
            # With k steps, the state is kept at T / k borders and k steps are alive: least at the root of their ratio.
            per_step = max(1.0, needed / self.T)
            least = math.sqrt(self.T * state_bytes(self.model, self.calls[group[-1]]) / per_step)
            steps = max(1, round(max(least, self.slice / (per_step * share))))
        steps = steps if steps is not None and steps < self.T else None
        return Slices(samples, steps, self.N if samples is not None else 0)

    # -- what is worth it -------------------------------------------------------------------------------------------

    def _next_level(self, name: str, levels: Mapping[str, int]) -> int:
        level = levels.get(name, 0) + 1
        return 2 if level == 1 and name not in self.light else level

    def _most_worth(self, peak: Moment, levels: Mapping[str, int]) -> str | None:
        best, name = 0.0, None
        for candidate in self.names:
            level = self._next_level(candidate, levels)
            if level > (2 if candidate in self.full else 1) and not (
                candidate == peak.name and self._can_be_twice(peak, levels)
            ):
                continue
            freed = self._freed(candidate, levels.get(candidate, 0), level, peak)
            before = self._group(candidate, levels[candidate]) if candidate in levels else ()
            more = [n for n in self._group(candidate, level) if n not in before or level == 3]
            worth = freed / (self._seconds(more) + 1e-5)
            if worth > best and freed > 0.001 * peak.bytes:
                best, name = worth, candidate
        return name

    def _freed(self, name: str, before: int, after: int, peak: Moment) -> float:
        """Bytes that a higher level frees at the peak."""
        here, there = self.place[name], self.place.get(peak.name, 0)
        made = sum(self._size(v) for n in self._group(name, after)[:-1] for v in self.calls[n].makes)
        if here == there and peak.phase == "backward":
            if after == 1:
                return self.costs[name]["saved"] + self.costs[name]["backward"] - self.slice
            # With level 2 alone, what was kept is computed again instead.
            return made if self._can_be_cut(name) else 0.0
        # What belongs to later calls is gone by then, or not there yet.
        return self._kept(name, before) - self._kept(name, after) if here <= there else 0.0

    def _kept(self, name: str, level: int) -> float:
        """Bytes kept for backward on account of a tile and the products in front of it."""
        products = [n for n in self.full.get(name, ()) if n != name and n in self.tiles]
        if level > 1:
            made = {v for n in self.full[name] for v in self.calls[n].makes}
            return sum(self._size(v) for v in {v for n in self.full[name] for v in self.calls[n].reads} - made)
        values = {v for n in products for v in self.calls[n].saves}
        tile = self.calls[name]
        values |= set(tile.saves if level == 0 else tile.reads)
        own = sum(self.costs[n]["saved"] for n in (*products, *((name,) if level == 0 else ())))
        return own + sum(map(self._size, values))

    def _can_be_twice(self, peak: Moment, levels: Mapping[str, int]) -> bool:
        """Whether the products of the tile at the peak can be computed two times in backward."""
        return peak.phase == "backward" and levels.get(peak.name) == 2 and self._can_be_cut(peak.name)

    def _can_be_cut(self, name: str) -> bool:
        """Whether a tile and the products in front of it can go through slices together, between statistics."""
        group = self.full.get(name, ())
        tiles = [self.tiles[n] for n in group if n in self.tiles]
        is_cut = all(tile.by_samples for tile in tiles) or all(tile.by_steps for tile in tiles)
        return is_cut and 1 < len(tiles) < len(group)

    def _holds_more(self, group: Sequence[str]) -> bool:
        """Whether the histories of some calls hold more than what goes in."""
        calls = [self.calls[name] for name in group]
        made = {v for call in calls for v in call.makes}
        kept = {v for call in calls for v in call.saves}
        held = sum(self.costs[name]["saved"] for name in group) + sum(map(self._size, kept))
        instead = {v for call in calls for v in call.reads if v not in made}
        return held > 1.01 * sum(map(self._size, instead))

    def _size(self, value: int) -> float:
        """Bytes of a value when it is kept."""
        return self.sizes[value]

    def _seconds(self, names: Sequence[str]) -> float:
        """About how long some calls take, for comparing them."""
        costs = [self.costs[name] for name in names]
        return sum(c["written"] / _BYTES_PER_SECOND + c["operations"] / _OPERATIONS_PER_SECOND for c in costs)
