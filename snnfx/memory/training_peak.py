"""The bytes that a training step holds under a plan of what its backward pass computes again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from snnfx.memory.model import CallCost, MemoryModel

__all__ = ["Moment", "recompute_seconds", "state_bytes", "training_peak", "training_timeline"]

_BYTES_PER_SECOND = 3e9
_OPERATIONS_PER_SECOND = 3e10
"""One core; only their ratio matters, for what is cheaper to compute again."""


@dataclass(frozen=True)
class Moment:
    """The widest point of one call: bytes alive, its region, and "forward" or "backward"."""

    bytes: float
    name: str
    phase: str


def recompute_seconds(call: CallCost, steps: int) -> float:
    """About how long a call takes, for comparing calls."""
    return call.bytes["written"](steps) / _BYTES_PER_SECOND + call.bytes["operations"](steps) / _OPERATIONS_PER_SECOND


def training_peak(
    model: MemoryModel, steps: int, chunks: Mapping[str, int | None], packed: Mapping[int, float]
) -> Moment:
    """The widest point of a training step, see `training_timeline`."""
    moments = training_timeline(model, steps, chunks, packed)
    return max(moments, key=lambda at: at.bytes, default=Moment(0.0, "", "forward"))


def training_timeline(
    model: MemoryModel, steps: int, chunks: Mapping[str, int | None], packed: Mapping[int, float]
) -> list[Moment]:
    """The widest point of each call, forward and then backward.

    Args:
        model: with a history.
        steps: time steps run at once.
        chunks: the regions that backward computes again, by name, with the time steps at once in each (None: all).
            Statistics are computed again together with the region that they are taken of.
        packed: for values that can be kept packed, the part of their bytes that this takes.
    """
    return _Timeline(model, steps, chunks, packed).moments


class _Timeline:
    def __init__(
        self, model: MemoryModel, steps: int, chunks: Mapping[str, int | None], packed: Mapping[int, float]
    ) -> None:
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
        self.kept: dict[object, float] = {}
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
        self.moments.append(Moment(self._now() + widest, call.name, "forward"))
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
        self.moments.append(Moment(now, call.name, "backward"))
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
