"""The bytes that a call of a net holds over its execution, at the widest point of each region's call.

In training, under a plan of what the backward pass computes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.memory.memory_model import CallCost, MemoryModel
from snnfx.recompute.tile import Slices

__all__ = [
    "Moment",
    "inference_peak",
    "inference_timeline",
    "state_bytes",
    "training_peak",
    "training_timeline",
    "widest_of",
]


@dataclass(frozen=True)
class Moment:
    """The widest point of one call.

    Args:
        bytes: alive.
        name: of the region, or of the node between regions.
        phase: "forward" or "backward".
        held: by what, if that was asked for. Keys are kinds with a number: of a value ("result" while others read it,
            "value" or "packed" when it is kept for backward, "gradient", "again" when it is computed again), of a call
            ("own": what its history holds, "work": while it runs), or 0 ("parameters": their gradients, "state": that
            of the net between chunks).
    """

    bytes: float
    name: str
    phase: str
    held: Mapping[tuple[str, int], float] = field(default_factory=dict)


_NOTHING = Moment(0.0, "", "forward")


def widest_of(moments: Iterable[Moment]) -> Moment:
    """The moment at which most is held."""
    return max(moments, key=lambda at: at.bytes, default=_NOTHING)


def inference_peak(model: MemoryModel, steps: int, hands_on: bool = True) -> Moment:
    """The widest point of running so many steps at once without a history, see `inference_timeline`."""
    return widest_of(inference_timeline(model, steps, hands_on=hands_on))


def inference_timeline(model: MemoryModel, steps: int, detailed: bool = False, hands_on: bool = True) -> list[Moment]:
    """The widest point of each call without a history.

    Args:
        model: without a history.
        steps: time steps run at once.
        detailed: say of each moment what is held.
        hands_on: whether the final state is kept, for the next chunk or for the caller of `run`.
    """
    alive: dict[int, float] = {}
    moments = []
    for index, call in enumerate(model.calls):
        work = call.bytes["peak"](steps)
        held: dict[tuple[str, int], float] = {("result", v): b for v, b in alive.items()} if detailed else {}
        if detailed:
            held["work", index] = work
        moments.append(Moment(sum(alive.values()) + work, call.name, "forward", held))
        alive.update((value, model.values[value](steps)) for value in call.makes)
        for value in call.dies if hands_on else (*call.dies, *call.finals):
            alive.pop(value, None)
    return moments


def training_peak(model: MemoryModel, steps: int, plan: RecomputePlan, packed: Mapping[int, float]) -> Moment:
    """The widest point of a training step, see `training_timeline`."""
    return widest_of(training_timeline(model, steps, plan, packed))


def training_timeline(
    model: MemoryModel, steps: int, plan: RecomputePlan, packed: Mapping[int, float], detailed: bool = False
) -> list[Moment]:
    """The widest point of each call, forward and then backward.

    Args:
        model: with a history; in tiles if anything is computed again.
        steps: time steps run at once.
        plan: its segments; its `steps` are not looked at.
        packed: for values that can be kept packed, the part of their bytes that this takes.
        detailed: say of each moment what is held.
    """
    return _Timeline(model, steps, plan, packed, detailed).moments


@dataclass
class _SegmentGroup:
    """What is computed again together, by the numbers of its calls."""

    products: list[int]
    statistics: list[int]
    tile: int
    slices: Slices
    twice: bool
    reads: tuple[int, ...] = ()
    inner: frozenset[int] = frozenset()

    @property
    def is_cut(self) -> bool:
        return self.slices != Slices()

    @property
    def members(self) -> list[int]:
        return [*self.products, *self.statistics, self.tile]


class _Timeline:
    def __init__(
        self,
        model: MemoryModel,
        steps: int,
        plan: RecomputePlan,
        packed: Mapping[int, float],
        detailed: bool,
    ) -> None:
        self.detailed = detailed
        self.model, self.steps, self.calls, self.costs = model, steps, model.calls, model.costs(steps)
        self.packed, self.packs = packed, plan.packs
        self.size = [value(steps) for value in model.values]
        self.moments: list[Moment] = []
        self.group_of: dict[int, _SegmentGroup] = {}
        self._take_groups(plan)
        self.holders: dict[int, list[int]] = {}
        self.packers: dict[int, list[int]] = {}
        self._find_holders()
        self.released: dict[int, list[tuple[str, int]]] = {}
        for kind, table in (("value", self.holders), ("packed", self.packers)):
            for value, users in table.items():
                # Backward comes last to the first of them.
                self.released.setdefault(users[0], []).append((kind, value))
        self.kept: dict[tuple[str, int], float] = {}
        self.kept_bytes = 0.0
        self.alive: dict[int, float] = {}
        self.alive_bytes = 0.0
        for index in range(len(self.calls)):
            self._forward(index)
        # What is returned stays with the caller until the end; what is kept anyway is not counted twice.
        self.alive = {v: b for v, b in self.alive.items() if v in model.outputs}
        self.alive_bytes = sum(b for v, b in self.alive.items() if ("value", v) not in self.kept)
        self.grads: dict[int, float] = {}
        self.of_parameters = 0.0
        for index in range(len(self.calls) - 1, -1, -1):
            self._backward(index)

    def _take_groups(self, plan: RecomputePlan) -> None:
        number = {call.name: index for index, call in enumerate(self.calls)}
        for names in plan.segments:
            indices = [number[name] for name in names if name in number]
            if not indices or names[-1] not in number:
                continue
            tile = indices[-1]
            products = [i for i in indices[:-1] if self.calls[i].role == "product"]
            statistics = [i for i in indices[:-1] if self.calls[i].role != "product"]
            group = _SegmentGroup(
                products, statistics, tile, plan.slices.get(names[-1], Slices()), names[-1] in plan.twice
            )
            group.inner = frozenset(v for i in (*products, *statistics) for v in self.calls[i].makes)
            reads = dict.fromkeys(v for i in group.members for v in self.calls[i].reads if v not in group.inner)
            group.reads = tuple(reads)
            self.group_of.update(dict.fromkeys(group.members, group))

    def _is_left_out(self, index: int) -> bool:
        """Whether nobody takes these statistics: the module is called as it is."""
        return self.calls[index].role == "statistics" and index not in self.group_of

    def _find_holders(self) -> None:
        for index, call in enumerate(self.calls):
            group = self.group_of.get(index)
            if (group is not None and index != group.tile) or self._is_left_out(index):
                continue
            for value in call.saves if group is None else group.reads:
                packs = value in self.packed and (group is not None or (self.packs and call.role == "product"))
                table = self.packers if packs else self.holders
                table.setdefault(value, []).append(index)

    def _sizes(self, values: Iterable[int]) -> float:
        return sum(self.size[v] for v in values)

    def _keep(self, key: tuple[str, int], count: float) -> None:
        if key not in self.kept:
            self.kept[key] = count
            self.kept_bytes += count
            if key[0] == "value":
                self.alive_bytes -= self.alive.get(key[1], 0.0)

    def _let_go(self, key: tuple[str, int]) -> None:
        if key in self.kept:
            self.kept_bytes -= self.kept.pop(key)
            if key[0] == "value":
                self.alive_bytes += self.alive.get(key[1], 0.0)

    def _dies(self, value: int) -> None:
        count = self.alive.pop(value, 0.0)
        if ("value", value) not in self.kept:
            self.alive_bytes -= count

    def _now(self) -> float:
        """Bytes of what is kept and of results; those that are kept are not counted twice."""
        return self.kept_bytes + self.alive_bytes

    def _note(self, index: int, phase: str, total: float, again: Mapping[int, float] | None = None) -> None:
        held: dict[tuple[str, int], float] = {}
        if self.detailed:
            held = dict(self.kept)
            held |= {("result", v): b for v, b in self.alive.items() if ("value", v) not in self.kept}
            if phase == "backward":
                held |= {("gradient", v): b for v, b in self.grads.items()}
                held |= {("again", v): b for v, b in (again or {}).items()}
                held["parameters", 0] = self.of_parameters
            held["work", index] = total - sum(held.values())
        self.moments.append(Moment(total, self.calls[index].name, phase, held))

    # -- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, index: int) -> None:
        call, group = self.calls[index], self.group_of.get(index)
        if group is not None and not group.statistics and index != group.tile:
            return  # it goes through the slices together with the tile
        if self._is_left_out(index):
            return
        widest = self._work_forward(index, call, group)
        if group is None or index == group.tile:
            for value in call.reads if group is None else group.reads:
                if index in self.packers.get(value, ()):
                    self._keep(("packed", value), self.size[value] * self.packed[value])
        self._note(index, "forward", self._now() + widest)
        if group is None:
            self._keep(("own", index), self.costs[index]["saved"])
        for value in call.makes:
            self.alive[value] = self.size[value]
            self.alive_bytes += self.size[value]
        if group is None or index == group.tile:
            for value in (*call.makes, *(call.reads if group is None else group.reads)):
                if index in self.holders.get(value, ()):
                    self._keep(("value", value), self.size[value])
        for value in call.dies:
            self._dies(value)

    def _work_forward(self, index: int, call: CallCost, group: _SegmentGroup | None) -> float:
        if group is None:
            return self.costs[index]["peak_with_history"]
        if not group.is_cut:
            made = 0.0 if group.statistics else self._sizes(v for i in group.products for v in self.calls[i].makes)
            return made + self.costs[index]["peak"]
        joint = [index, *(group.products if index == group.tile and not group.statistics else ())]
        return self._sizes(call.makes) + sum(self._on_slice("peak", i, group.slices) for i in joint)

    def _on_slice(self, cost: str, index: int, slices: Slices) -> float:
        """Bytes of a call on one slice."""
        length = self.steps if slices.steps is None else min(slices.steps, self.steps)
        return self.model.costs(length)[index][cost] * slices.share

    # -- backward ---------------------------------------------------------------------------------------------------

    def _backward(self, index: int) -> None:
        call, group = self.calls[index], self.group_of.get(index)
        if (group is not None and index != group.tile) or self._is_left_out(index):
            return
        for value in call.makes:
            self.grads.pop(value, None)
        now = self._now() + sum(self.grads.values()) + self.of_parameters
        if group is None:
            # Who keeps its sequences packed has them as they are for as long as it runs.
            unpacked = self._sizes(v for v in call.saves if index in self.packers.get(v, ()))
            self._note(index, "backward", now + unpacked + self.costs[index]["backward"])
        else:
            work, again = self._work_backward(group)
            self._note(index, "backward", now + work, again)
        for i in [index] if group is None else group.members:
            self.of_parameters += self.costs[i]["of_parameters"]
            if self.costs[i]["grads"] > 0:
                inner = group.inner if group is not None else ()
                self.grads.update((value, self.size[value]) for value in self.calls[i].reads if value not in inner)
        self._let_go(("own", index))
        for key in self.released.get(index, ()):
            self._let_go(key)

    def _work_backward(self, group: _SegmentGroup) -> tuple[float, Mapping[int, float]]:
        """What a segment takes while it goes back, and what of that are values computed again."""
        calls, tile = self.calls, self.calls[group.tile]
        # The gradients of its results; a final state seldom has one.
        given = self._sizes(v for v in tile.makes if v not in tile.finals)
        through = [i for i in group.members if self.costs[i]["grads"] > 0]
        found = self._sizes({v for i in through for v in calls[i].reads if v not in group.inner})
        made = {v: self.size[v] for i in group.products for v in calls[i].makes}
        again = sum(made.values())

        def part(cost: str, *indices: int) -> float:
            return sum(self._on_slice(cost, i, group.slices) for i in indices)

        def unpacked(*indices: int) -> float:
            values = {v for i in indices for v in calls[i].reads if group.tile in self.packers.get(v, ())}
            return self._sizes(values) * self._share(group.slices)

        def inside(*indices: int) -> float:
            """Running slices of some calls with a history and going back: the gradients that are cut count as well."""
            last = indices[-1]
            results = self._sizes(v for i in indices[:-1] for v in calls[i].makes) * self._share(group.slices)
            there = unpacked(*indices) + part("saved", *indices[:-1]) + results
            return there + max(part("peak_with_history", last), part("saved", last) + part("backward_held", last))

        borders = 0.0
        if group.slices.steps is not None:
            borders = self.steps / group.slices.steps * state_bytes(self.model, tile) * group.slices.share
        if not group.statistics or not group.products:
            members = (*group.products, group.tile) if not group.statistics else (group.tile,)
            if group.is_cut:
                return given + found + borders + inside(*members), {}
            # One slice: its gradients are those of the whole.
            last = max(
                given + part("peak_with_history", group.tile),
                part("saved", group.tile) + part("backward_held", group.tile),
            )
            return unpacked(*members) + part("saved", *members[:-1]) + again * (not group.statistics) + last, {}
        if not group.is_cut:
            work = unpacked(group.tile) + max(
                given + part("peak_with_history", group.tile),
                part("saved", group.tile) + part("backward_held", group.tile),
            )
            beside = self._sizes(v for v in tile.reads if v not in group.inner) if group.tile in through else 0.0
            second = (
                given + beside + max(unpacked(i) + part("saved", i) + part("backward_held", i) for i in group.products)
            )
            first = max(unpacked(i) + part("peak_with_history", i) for i in group.products)
            return again + max(first - again, work, second), made
        # The gradient of what was normalised is there as a whole; so is what was normalised, if it is computed once.
        whole = again * (1 if group.twice else 2)
        own = again * self._share(group.slices) if group.twice else 0.0
        product = max(
            unpacked(i) + max(part("peak_with_history", i), part("saved", i) + part("backward_held", i))
            for i in group.products
        )
        first = own + inside(group.tile) + (part("peak", *group.products) if group.twice else 0.0)
        work = given + found + whole + borders + max(first, own + product)
        return work, {} if group.twice else made

    def _share(self, slices: Slices) -> float:
        """The part of a sequence that is in a slice."""
        return slices.share * (1.0 if slices.steps is None else min(1.0, slices.steps / self.steps))


def state_bytes(model: MemoryModel, call: CallCost) -> float:
    """Bytes of the state of a loop: what it makes besides sequences."""
    return sum(model.values[v].constant for v in call.makes if model.values[v].per_step <= 0.0)
