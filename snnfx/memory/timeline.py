"""The bytes that a call of a net holds over its execution, at the widest point of each region's call.

In training, under a plan of what the backward pass computes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from snnfx.memory.model import CallCost, MemoryModel

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
            "value" or "packed" when it is kept for backward, "gradient"), of a call ("own": what its history holds,
            "borders": its state between chunks, "work": while it runs), or 0 ("parameters": their gradients, "state":
            that of the net between chunks).
    """

    bytes: float
    name: str
    phase: str
    held: Mapping[tuple[str, int], float] = field(default_factory=dict)


_NOTHING = Moment(0.0, "", "forward")


def widest_of(moments: Iterable[Moment]) -> Moment:
    """The moment at which most is held."""
    return max(moments, key=lambda at: at.bytes, default=_NOTHING)


def inference_peak(model: MemoryModel, steps: int) -> Moment:
    """The widest point of running so many steps at once without a history."""
    return widest_of(inference_timeline(model, steps))


def inference_timeline(model: MemoryModel, steps: int, detailed: bool = False) -> list[Moment]:
    """The widest point of each call without a history; with `detailed`, what is held there."""
    alive: dict[int, float] = {}
    moments = []
    for index, call in enumerate(model.calls):
        work = call.bytes["peak"](steps)
        held: dict[tuple[str, int], float] = {("result", v): b for v, b in alive.items()} if detailed else {}
        if detailed:
            held["work", index] = work
        moments.append(Moment(sum(alive.values()) + work, call.name, "forward", held))
        alive.update((value, model.values[value](steps)) for value in call.makes)
        for value in call.dies:
            alive.pop(value, None)
    return moments


def training_peak(
    model: MemoryModel, steps: int, chunks: Mapping[str, int | None], packed: Mapping[int, float]
) -> Moment:
    """The widest point of a training step, see `training_timeline`."""
    return widest_of(training_timeline(model, steps, chunks, packed))


def training_timeline(
    model: MemoryModel,
    steps: int,
    chunks: Mapping[str, int | None],
    packed: Mapping[int, float],
    detailed: bool = False,
) -> list[Moment]:
    """The widest point of each call, forward and then backward.

    Args:
        model: with a history.
        steps: time steps run at once.
        chunks: the regions that backward computes again, by name, with the time steps at once in each (None: all).
            Statistics are computed again together with the region that they are taken of.
        packed: for values that can be kept packed, the part of their bytes that this takes.
        detailed: say of each moment what is held.
    """
    return _Timeline(model, steps, chunks, packed, detailed).moments


class _Timeline:
    def __init__(
        self,
        model: MemoryModel,
        steps: int,
        chunks: Mapping[str, int | None],
        packed: Mapping[int, float],
        detailed: bool = False,
    ) -> None:
        self.detailed = detailed
        self.model, self.steps, self.chunks, self.packed = model, steps, chunks, packed
        self.calls = model.calls
        self.size = [value(steps) for value in model.values]
        self.again = [call.is_region and call.name in chunks for call in self.calls]
        self.moments: list[Moment] = []
        # Between a region and its statistics, nothing is kept if both are computed again.
        self.start_of: dict[int, int] = {}
        for index, call in enumerate(self.calls):
            before = self.calls[index - 1] if index else call
            if self.again[index] and index and self.again[index - 1] and call.name == f"{before.name}_statistics":
                self.start_of[index] = index - 1
        self.starts = set(self.start_of.values())
        inner = {value for index in self.starts for value in self.calls[index].makes}
        self.holders: dict[int, list[int]] = {}
        self.packers: dict[int, list[int]] = {}
        for index, call in enumerate(self.calls):
            for value in call.reads if self.again[index] else call.saves:
                if value in inner and index in self.start_of:
                    continue
                table = self.packers if self.again[index] and value in packed else self.holders
                table.setdefault(value, []).append(index)
        self.kept: dict[tuple[str, int], float] = {}
        self.alive: dict[int, float] = {}
        for index in range(len(self.calls)):
            self._forward(index)
        # What is returned stays with the caller until the end; what is kept anyway is not counted twice.
        self.alive = {v: b for v, b in self.alive.items() if v in model.outputs}
        self.grads: dict[int, float] = {}
        self.of_parameters = 0.0
        for index in range(len(self.calls) - 1, -1, -1):
            self._backward(index)

    def _chunk(self, index: int) -> int | None:
        chunk = self.chunks.get(self.calls[index].name) if self.again[index] else None
        return chunk if chunk is not None and chunk < self.steps else None

    def _sizes(self, values: Iterable[int]) -> float:
        return sum(self.size[v] for v in values)

    def _now(self) -> float:
        extra = sum(count for value, count in self.alive.items() if ("value", value) not in self.kept)
        return sum(self.kept.values()) + extra

    def _note(self, index: int, phase: str, total: float) -> None:
        held: dict[tuple[str, int], float] = {}
        if self.detailed:
            held = dict(self.kept)
            held |= {("result", v): b for v, b in self.alive.items() if ("value", v) not in self.kept}
            if phase == "backward":
                held |= {("gradient", v): b for v, b in self.grads.items()}
                held["parameters", 0] = self.of_parameters
            held["work", index] = total - sum(held.values())
        self.moments.append(Moment(total, self.calls[index].name, phase, held))

    def _forward(self, index: int) -> None:
        call, chunk = self.calls[index], self._chunk(index)
        if chunk is not None:
            widest = self._sizes(call.makes) + call.bytes["peak"](chunk)
            self.kept["borders", index] = (self.steps // chunk) * state_bytes(self.model, call)
        else:
            widest = call.bytes["peak" if self.again[index] else "peak_with_history"](self.steps)
        for value in call.reads:
            if index in self.packers.get(value, ()):
                self.kept["packed", value] = self.size[value] * self.packed[value]
        self._note(index, "forward", self._now() + widest)
        if not self.again[index]:
            self.kept["own", index] = call.bytes["saved"](self.steps)
        for value in call.makes:
            self.alive[value] = self.size[value]
        for value in (*call.reads, *call.makes):
            if index in self.holders.get(value, ()):
                self.kept["value", value] = self.size[value]
        for value in call.dies:
            self.alive.pop(value, None)

    def _backward(self, index: int) -> None:
        call, cost, steps = self.calls[index], self.calls[index].bytes, self.steps
        held = self._sizes(call.makes)  # the gradients of what it made
        for value in call.makes:
            self.grads.pop(value, None)
        now = self._now() + sum(self.grads.values()) + self.of_parameters
        chunk = self._chunk(index)
        if index in self.starts:
            # The gradients that its statistics were given are still held.
            now += self._sizes(v for v in self.calls[index + 1].makes)
        if index in self.start_of:
            start = self.calls[index - 1]
            first = self._chunk(index - 1)
            again = self._sizes(start.makes) + start.bytes["peak"](first) if first else start.bytes["peak"](steps)
            rest = (
                self._sizes(start.makes)
                + cost["saved"](steps)
                + max(held + cost["peak_with_history"](steps) - cost["saved"](steps), cost["backward_held"](steps))
            )
            now += max(held + again, rest)
        elif not self.again[index]:
            now += cost["backward"](steps)
        elif chunk is not None:
            now += self._sizes((*call.makes, *call.reads))
            now += max(cost["peak_with_history"](chunk), cost["saved"](chunk) + cost["backward_held"](chunk))
        else:
            now += self._sizes(v for v in call.reads if index in self.packers.get(v, ()))
            now += max(held + cost["peak_with_history"](steps), cost["saved"](steps) + cost["backward_held"](steps))
        self._note(index, "backward", now)
        self.of_parameters += cost["of_parameters"](steps)
        self.kept.pop(("own", index), None)
        self.kept.pop(("borders", index), None)
        for label, table in (("value", self.holders), ("packed", self.packers)):
            for value, users in table.items():
                if users[0] == index:
                    self.kept.pop((label, value), None)
        if cost["grads"](steps) > 0:
            self.grads.update((value, self.size[value]) for value in call.reads)


def state_bytes(model: MemoryModel, call: CallCost) -> float:
    """Bytes of the state of a loop: what it makes besides sequences."""
    return sum(model.values[v].constant for v in call.makes if model.values[v].per_step <= 0.0)
