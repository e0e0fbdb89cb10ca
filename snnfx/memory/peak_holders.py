"""Name the tensors that hold the most memory at one moment of a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snnfx.memory.budget import bytes_as_text
from snnfx.memory.memory_model import MemoryModel, TensorNames
from snnfx.memory.meter import NamedBytes
from snnfx.memory.timeline import Moment

OUTSIDE = "parameters and state"
"""Where the gradients of parameters and the state between chunks of the net are counted."""


@dataclass(frozen=True)
class Holder:
    """What holds bytes at the peak.

    Args:
        what: who made the tensor, e.g. "layer1.0.conv1 (Conv2d)".
        kind: why it is there, e.g. "kept for backward".
        region: of the one who made it.
        shape, dtype: of the tensor; () and "" when it is not one tensor.
        bytes: that it takes.
    """

    what: str
    kind: str
    region: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def largest_holders(model: MemoryModel, moment: Moment, most: int = 3) -> str:
    """Who holds most at a moment, in a clause; `model` was made with `describe`, `moment` is detailed."""
    holders = sorted(HolderNames(model).holders(moment, TensorMakers(model)), key=lambda holder: -holder.bytes)
    return ", ".join(f"{h.what} {bytes_as_text(h.bytes)}" for h in holders[:most])


class TensorMakers:
    """Which region made what."""

    def __init__(self, model: MemoryModel) -> None:
        self.calls = [call.name for call in model.calls]
        self.of_value = {value: call.name for call in model.calls for value in call.makes}

    def of(self, key: tuple[str, int]) -> str:
        kind, number = key
        if kind in ("parameters", "state"):
            return OUTSIDE
        return self.calls[number] if kind in ("own", "work") else self.of_value[number]

    def by_region(self, moment: Moment) -> dict[str, int]:
        found: dict[str, int] = {}
        for key, count in moment.held.items():
            if round(count) > 0:
                found[self.of(key)] = found.get(self.of(key), 0) + round(count)
        return found


_KINDS = {
    "result": "result",
    "value": "kept for backward",
    "packed": "kept packed",
    "own": "kept within the region",
    "gradient": "gradient",
    "again": "computed again",
    "parameters": "gradients",
    "state": "state between chunks",
}


class HolderNames:
    """What a model says about who made what, as holders."""

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
            yield Holder(region, "its backward pass", region, (), "", round(count))
            return
        history = self.names.widest_with_history[number]
        yield from self._split(history or self.names.widest[number], "while it runs", region, count)

    @staticmethod
    def _split(parts: Sequence[NamedBytes], kind: str, region: str, count: float) -> Iterable[Holder]:
        """The tensors that a number of bytes consists of, as far as they are known."""
        left = count
        for part in parts:
            if 0 < part.bytes <= left + 1:
                left -= part.bytes
                yield Holder(part.what, kind, region, part.shape, part.dtype, round(part.bytes))
        if left >= 1:
            yield Holder(region, kind, region, (), "", round(left))
