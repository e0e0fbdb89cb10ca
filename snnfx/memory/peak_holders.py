"""Name the largest tensors at one moment of a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snnfx.memory.budget import bytes_as_text
from snnfx.memory.memory_model import MemoryModel, TensorNames
from snnfx.memory.meter import NamedBytes
from snnfx.memory.timeline import Moment

OUTSIDE = "parameters and state"
"""The pseudo-region of parameter gradients and of the states between chunks."""


@dataclass(frozen=True)
class Holder:
    """One entry of the memory at the peak.

    Args:
        what: the module or operation that made the tensor, e.g. "layer1.0.conv1 (Conv2d)".
        kind: why the tensor is allocated, e.g. "saved for backward".
        region: the region that made the tensor.
        shape, dtype: of the tensor; () and "" if the entry is not a single tensor.
        bytes: the size of the entry.
    """

    what: str
    kind: str
    region: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def largest_holders(model: MemoryModel, moment: Moment, most: int = 3) -> str:
    """The largest entries at a moment, in a clause; needs a `model` made with `describe` and a detailed `moment`."""
    holders = sorted(HolderNames(model).holders(moment, TensorMakers(model)), key=lambda holder: -holder.bytes)
    return ", ".join(f"{h.what} {bytes_as_text(h.bytes)}" for h in holders[:most])


class TensorMakers:
    """Maps entries of `Moment.held` to the region that made them."""

    def __init__(self, model: MemoryModel) -> None:
        self.calls = [call.name for call in model.calls]
        self.of_value = {value: call.name for call in model.calls for value in call.makes}

    def of(self, key: tuple[str, int]) -> str:
        kind, number = key
        if kind in ("parameters", "state"):
            return OUTSIDE
        return self.calls[number] if kind in ("own", "work") else self.of_value[number]

    def by_region(self, moment: Moment) -> dict[str, int]:
        totals: dict[str, int] = {}
        for key, count in moment.held.items():
            if round(count) > 0:
                totals[self.of(key)] = totals.get(self.of(key), 0) + round(count)
        return totals


_KINDS = {
    "result": "result",
    "value": "saved for backward",
    "packed": "saved for backward, packed",
    "own": "saved inside the region",
    "gradient": "gradient",
    "again": "recomputed",
    "parameters": "gradients",
    "state": "state between chunks",
}


class HolderNames:
    """Lists the entries of a moment with the names that a model knows."""

    def __init__(self, model: MemoryModel) -> None:
        self.model = model
        none: list[tuple[()]] = [() for _ in model.calls]
        self.names = model.named or TensorNames([], none, none, none)  # type: ignore[arg-type]

    def holders(self, moment: Moment, makers: TensorMakers) -> Iterable[Holder]:
        for key, count in moment.held.items():
            (kind, number), region = key, makers.of(key)
            if round(count) <= 0:
                continue
            if kind in ("result", "value", "packed", "gradient", "again") and number < len(self.names.values):
                value = self.names.values[number]
                yield Holder(value.what, _KINDS[kind], region, value.shape, value.dtype, round(count))
            elif kind == "own" and self.names.saved[number]:
                yield from self._split(self.names.saved[number], _KINDS[kind], region, count)
            elif kind == "work":
                yield from self._work(moment, number, region, count)
            else:
                what = {"parameters": "all parameters", "state": "all neurons"}.get(kind, region)
                yield Holder(what, _KINDS[kind], "" if region == OUTSIDE else region, (), "", round(count))

    def _work(self, moment: Moment, number: int, region: str, count: float) -> Iterable[Holder]:
        if moment.phase == "backward":
            yield Holder(region, "backward pass", region, (), "", round(count))
            return
        with_grad = self.names.widest_with_history[number]
        yield from self._split(with_grad or self.names.widest[number], "temporary", region, count)

    @staticmethod
    def _split(parts: Sequence[NamedBytes], kind: str, region: str, count: float) -> Iterable[Holder]:
        """Split a number of bytes into known tensors and a rest."""
        left = count
        for part in parts:
            if 0 < part.bytes <= left + 1:
                left -= part.bytes
                yield Holder(part.what, kind, region, part.shape, part.dtype, round(part.bytes))
        if left >= 1:
            yield Holder(region, kind, region, (), "", round(left))
