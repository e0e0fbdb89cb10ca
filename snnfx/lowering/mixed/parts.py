"""The parts of larger values: of concatenations and stacks, and of gradients that are zero elsewhere.

Kernels write a part to its place in the larger value where they can; other parts are copied there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, RecordedValue, ValueReference

__all__ = ["JOINS", "Part", "is_placed", "parts_of"]

JOINS = frozenset(("cat", "stack"))
"""The calls whose parts cover the whole result; other results are zero elsewhere."""


@dataclass(frozen=True)
class Part:
    """A value that lies in a larger value.

    Args:
        number: the value.
        dim, start, size: its place in the larger value.
        without_dim: whether the value lacks the dimension `dim`, of size 1.
    """

    number: int
    dim: int
    start: int
    size: int
    without_dim: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """The view of the part in a buffer `[R, *]` of the larger value."""
        if self.without_dim:
            return whole.select(self.dim + 1, self.start)
        return whole.narrow(self.dim + 1, self.start, self.size)


def parts_of(call: AtenCall, values: Sequence[RecordedValue]) -> list[Part]:
    """The parts of the result of a call, none of which needs a cast or a broadcast; [] for other calls."""
    if call.kwargs or len(call.results) != 1:
        return []
    result = values[call.results[0]]
    parts = list(_parts(call, values, len(result.shape)))
    for part in parts:
        value = values[part.number]
        rank = len(value.shape) + part.without_dim
        if value.dtype != result.dtype or rank != len(result.shape):  # `cat` promotes and ignores empty tensors
            return []
    return parts


def _parts(call: AtenCall, values: Sequence[RecordedValue], rank: int) -> Iterator[Part]:
    if call.name in JOINS:
        dim, start = (call.args[1] if len(call.args) > 1 else 0) % rank, 0
        for reference in call.args[0]:
            is_stack = call.name == "stack"
            shape = values[reference.number].shape
            size = 1 if is_stack else shape[dim] if len(shape) == rank else 0
            yield Part(reference.number, dim, start, size, is_stack)
            start += size
    elif call.name in ("select_backward", "slice_backward") and isinstance(call.args[0], ValueReference):
        number, dim, start = call.args[0].number, call.args[2] % rank, call.args[3]
        length = values[call.results[0]].shape[dim]
        if call.name == "select_backward":
            yield Part(number, dim, start % length, 1, without_dim=True)
        elif call.args[5] == 1:
            start = min(max(start + length if start < 0 else start, 0), length)
            yield Part(number, dim, start, values[number].shape[dim])


def is_placed(part: Part, whole: RecordedValue) -> bool:
    """Whether the part is contiguous in the larger value, as kernels write it."""
    return all(size == 1 for size in whole.shape[: part.dim])
