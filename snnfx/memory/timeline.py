"""Predict the memory of a net over time: one peak for each region's call, forward and backward.

In training, the timeline follows a recomputation plan.
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
    """The memory at the peak of one call.

    Args:
        bytes: allocated bytes.
        name: the region, or the node between regions.
        phase: "forward" or "backward".
        held: with `detailed`, the allocated bytes by `(kind, number)`. The number is a value ("result": later calls
            read it; "value" or "packed": saved for backward; "gradient"; "again": recomputed), a call ("own": tensors
            that it saves for backward; "work": temporaries while it runs), or 0 ("parameters": their gradients;
            "state": the states between chunks).
    """

    bytes: float
    name: str
    phase: str
    held: Mapping[tuple[str, int], float] = field(default_factory=dict)


_NOTHING = Moment(0.0, "", "forward")


def widest_of(moments: Iterable[Moment]) -> Moment:
    """The moment with the most allocated bytes."""
    return max(moments, key=lambda at: at.bytes, default=_NOTHING)


def inference_peak(model: MemoryModel, steps: int, hands_on: bool = True) -> Moment:
    """The peak of inference over this number of time steps, see `inference_timeline`."""
    return widest_of(inference_timeline(model, steps, hands_on=hands_on))


def inference_timeline(model: MemoryModel, steps: int, detailed: bool = False, hands_on: bool = True) -> list[Moment]:
    """The peak of each call in inference.

    Args:
        model: made with `training=False`.
        steps: time steps per chunk.
        detailed: fill in `Moment.held`.
        hands_on: whether the final state stays allocated, for the next chunk or the caller of `run`.
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
    """The peak of a training step, see `training_timeline`."""
    return widest_of(training_timeline(model, steps, plan, packed))


def training_timeline(
    model: MemoryModel, steps: int, plan: RecomputePlan, packed: Mapping[int, float], detailed: bool = False
) -> list[Moment]:
    """The peak of each call of a training step, forward and then backward.

    Args:
        model: made with `training=True`, and with `in_tiles=True` if the plan recomputes anything.
        steps: time steps of the sequence or chunk.
        plan: only its segments count; `plan.steps` is ignored.
        packed: for values that can be saved in packed form, the packed fraction of their bytes.
        detailed: fill in `Moment.held`.
    """
    return _Timeline(model, steps, plan, packed, detailed).moments


@dataclass
class _SegmentGroup:
    """A segment: calls that are recomputed together, by their numbers."""

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
        self._form_groups(plan)
        self.savers: dict[int, list[int]] = {}
        self.packers: dict[int, list[int]] = {}
        self._find_savers()
        self.released: dict[int, list[tuple[str, int]]] = {}
        for kind, table in (("value", self.savers), ("packed", self.packers)):
            for value, users in table.items():
                # Backward runs in reverse order, so the first user in forward is the last in backward.
                self.released.setdefault(users[0], []).append((kind, value))
        self.saved: dict[tuple[str, int], float] = {}
        self.saved_bytes = 0.0
        self.alive: dict[int, float] = {}
        self.alive_bytes = 0.0
        for index in range(len(self.calls)):
            self._forward(index)
        # The caller keeps the outputs until the end; an output that is also saved counts once.
        self.alive = {v: b for v, b in self.alive.items() if v in model.outputs}
        self.alive_bytes = sum(b for v, b in self.alive.items() if ("value", v) not in self.saved)
        self.grads: dict[int, float] = {}
        self.of_parameters = 0.0
        for index in range(len(self.calls) - 1, -1, -1):
            self._backward(index)

    def _form_groups(self, plan: RecomputePlan) -> None:
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

    def _is_fused_statistics(self, index: int) -> bool:
        """Whether a statistics call does not run: without a segment, the BatchNorm module computes its statistics."""
        return self.calls[index].role == "statistics" and index not in self.group_of

    def _find_savers(self) -> None:
        for index, call in enumerate(self.calls):
            group = self.group_of.get(index)
            if (group is not None and index != group.tile) or self._is_fused_statistics(index):
                continue
            for value in call.saves if group is None else group.reads:
                packs = value in self.packed and (group is not None or (self.packs and call.role == "product"))
                table = self.packers if packs else self.savers
                table.setdefault(value, []).append(index)

    def _sizes(self, values: Iterable[int]) -> float:
        return sum(self.size[v] for v in values)

    def _save(self, key: tuple[str, int], count: float) -> None:
        if key not in self.saved:
            self.saved[key] = count
            self.saved_bytes += count
            if key[0] == "value":
                self.alive_bytes -= self.alive.get(key[1], 0.0)

    def _release(self, key: tuple[str, int]) -> None:
        if key in self.saved:
            self.saved_bytes -= self.saved.pop(key)
            if key[0] == "value":
                self.alive_bytes += self.alive.get(key[1], 0.0)

    def _free(self, value: int) -> None:
        count = self.alive.pop(value, 0.0)
        if ("value", value) not in self.saved:
            self.alive_bytes -= count

    def _now(self) -> float:
        """Bytes of saved tensors and of results; a result that is also saved counts once."""
        return self.saved_bytes + self.alive_bytes

    def _note(self, index: int, phase: str, total: float, recomputed: Mapping[int, float] | None = None) -> None:
        held: dict[tuple[str, int], float] = {}
        if self.detailed:
            held = dict(self.saved)
            held |= {("result", v): b for v, b in self.alive.items() if ("value", v) not in self.saved}
            if phase == "backward":
                held |= {("gradient", v): b for v, b in self.grads.items()}
                held |= {("again", v): b for v, b in (recomputed or {}).items()}
                held["parameters", 0] = self.of_parameters
            held["work", index] = total - sum(held.values())
        self.moments.append(Moment(total, self.calls[index].name, phase, held))

    # -- forward ----------------------------------------------------------------------------------------------------

    def _forward(self, index: int) -> None:
        call, group = self.calls[index], self.group_of.get(index)
        if group is not None and not group.statistics and index != group.tile:
            return  # it runs slice by slice together with the tile
        if self._is_fused_statistics(index):
            return
        widest = self._work_forward(index, call, group)
        if group is None or index == group.tile:
            for value in call.reads if group is None else group.reads:
                if index in self.packers.get(value, ()):
                    self._save(("packed", value), self.size[value] * self.packed[value])
        self._note(index, "forward", self._now() + widest)
        if group is None:
            self._save(("own", index), self.costs[index]["saved"])
        for value in call.makes:
            self.alive[value] = self.size[value]
            self.alive_bytes += self.size[value]
        if group is None or index == group.tile:
            for value in (*call.makes, *(call.reads if group is None else group.reads)):
                if index in self.savers.get(value, ()):
                    self._save(("value", value), self.size[value])
        for value in call.dies:
            self._free(value)

    def _work_forward(self, index: int, call: CallCost, group: _SegmentGroup | None) -> float:
        if group is None:
            return self.costs[index]["peak_with_history"]
        if not group.is_cut:
            products = 0.0 if group.statistics else self._sizes(v for i in group.products for v in self.calls[i].makes)
            return products + self.costs[index]["peak"]
        fused = [index, *(group.products if index == group.tile and not group.statistics else ())]
        return self._sizes(call.makes) + sum(self._on_slice("peak", i, group.slices) for i in fused)

    def _on_slice(self, cost: str, index: int, slices: Slices) -> float:
        """The cost of a call on one slice, in bytes."""
        length = self.steps if slices.steps is None else min(slices.steps, self.steps)
        return self.model.costs(length)[index][cost] * slices.share

    # -- backward ---------------------------------------------------------------------------------------------------

    def _backward(self, index: int) -> None:
        call, group = self.calls[index], self.group_of.get(index)
        if (group is not None and index != group.tile) or self._is_fused_statistics(index):
            return
        for value in call.makes:
            self.grads.pop(value, None)
        now = self._now() + sum(self.grads.values()) + self.of_parameters
        if group is None:
            # A call that saves its sequences in packed form has them unpacked while its backward pass runs.
            unpacked = self._sizes(v for v in call.saves if index in self.packers.get(v, ()))
            self._note(index, "backward", now + unpacked + self.costs[index]["backward"])
        else:
            work, recomputed = self._work_backward(group)
            self._note(index, "backward", now + work, recomputed)
        for i in [index] if group is None else group.members:
            self.of_parameters += self.costs[i]["of_parameters"]
            if self.costs[i]["grads"] > 0:
                inner = group.inner if group is not None else ()
                self.grads.update((value, self.size[value]) for value in self.calls[i].reads if value not in inner)
        self._release(("own", index))
        for key in self.released.get(index, ()):
            self._release(key)

    def _work_backward(self, group: _SegmentGroup) -> tuple[float, Mapping[int, float]]:
        """The bytes of a segment during its backward pass, and the recomputed values among them."""
        calls, tile = self.calls, self.calls[group.tile]
        # Gradients of its results; a final state rarely has one.
        grads_of_results = self._sizes(v for v in tile.makes if v not in tile.finals)
        differentiated = [i for i in group.members if self.costs[i]["grads"] > 0]
        grads_of_inputs = self._sizes({v for i in differentiated for v in calls[i].reads if v not in group.inner})
        products = {v: self.size[v] for i in group.products for v in calls[i].makes}
        all_products = sum(products.values())

        def part(cost: str, *indices: int) -> float:
            return sum(self._on_slice(cost, i, group.slices) for i in indices)

        def unpacked(*indices: int) -> float:
            values = {v for i in indices for v in calls[i].reads if group.tile in self.packers.get(v, ())}
            return self._sizes(values) * self._share(group.slices)

        def inside(*indices: int) -> float:
            """The bytes of running and differentiating one slice of some calls, slices of gradients included."""
            last = indices[-1]
            results = self._sizes(v for i in indices[:-1] for v in calls[i].makes) * self._share(group.slices)
            saved = unpacked(*indices) + part("saved", *indices[:-1]) + results
            return saved + max(part("peak_with_history", last), part("saved", last) + part("backward_held", last))

        states = 0.0
        if group.slices.steps is not None:
            states = self.steps / group.slices.steps * state_bytes(self.model, tile) * group.slices.share
        if not group.statistics or not group.products:
            members = (*group.products, group.tile) if not group.statistics else (group.tile,)
            if group.is_cut:
                return grads_of_results + grads_of_inputs + states + inside(*members), {}
            # With a single slice, its gradients are the gradients of the whole sequences.
            last = max(
                grads_of_results + part("peak_with_history", group.tile),
                part("saved", group.tile) + part("backward_held", group.tile),
            )
            return unpacked(*members) + part("saved", *members[:-1]) + all_products * (not group.statistics) + last, {}
        if not group.is_cut:
            work = unpacked(group.tile) + max(
                grads_of_results + part("peak_with_history", group.tile),
                part("saved", group.tile) + part("backward_held", group.tile),
            )
            inputs = self._sizes(v for v in tile.reads if v not in group.inner) if group.tile in differentiated else 0.0
            second = (
                grads_of_results
                + inputs
                + max(unpacked(i) + part("saved", i) + part("backward_held", i) for i in group.products)
            )
            first = max(unpacked(i) + part("peak_with_history", i) for i in group.products)
            return all_products + max(first - all_products, work, second), products
        # The gradient of the normalised sequence is allocated as a whole; so is the sequence if it is recomputed once.
        whole = all_products * (1 if group.twice else 2)
        sliced = all_products * self._share(group.slices) if group.twice else 0.0
        product = max(
            unpacked(i) + max(part("peak_with_history", i), part("saved", i) + part("backward_held", i))
            for i in group.products
        )
        first = sliced + inside(group.tile) + (part("peak", *group.products) if group.twice else 0.0)
        work = grads_of_results + grads_of_inputs + whole + states + max(first, sliced + product)
        return work, {} if group.twice else products

    def _share(self, slices: Slices) -> float:
        """The fraction of a sequence that is in one slice."""
        return slices.share * (1.0 if slices.steps is None else min(1.0, slices.steps / self.steps))


def state_bytes(model: MemoryModel, call: CallCost) -> float:
    """Bytes of the state of a loop: its outputs that are not sequences."""
    return sum(model.values[v].constant for v in call.makes if model.values[v].per_step <= 0.0)
