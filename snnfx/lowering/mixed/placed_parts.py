"""The places of parts in larger values: kernels write them there, and calls such as `stack` copy nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, RecordedValue, ValueReference

__all__ = ["JOINS", "Places", "places_of_parts"]

Places = list[tuple[int, Callable[[Tensor], Tensor]]]
"""Values, each with a function from a buffer `[R, *]` to the part for the value."""

JOINS = frozenset(("cat", "stack"))
"""The calls whose parts cover the whole result; `select_backward` is zero elsewhere."""


def places_of_parts(call: AtenCall, values: Sequence[RecordedValue]) -> Places:
    """The parts of the result of a call, with their places in a buffer `[R, *]` of the result; [] for other calls."""
    if call.kwargs or len(call.results) != 1:
        return []
    return list(_places(call, values))


def _places(call: AtenCall, values: Sequence[RecordedValue]) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    result = values[call.results[0]]
    rank = len(result.shape)
    if call.name == "select_backward":
        part, _, dim, index = call.args
        is_dense = _is_outermost(dim % rank, result)
        if isinstance(part, ValueReference) and values[part.number].dtype == result.dtype and is_dense:
            yield part.number, partial(Tensor.select, dim=dim % rank + 1, index=index)
    elif call.name in JOINS:
        parts = [values[r.number] for r in call.args[0]]
        dim = (call.args[1] if len(call.args) > 1 else 0) % rank
        ranks = {len(part.shape) + (call.name == "stack") for part in parts}
        if ranks != {rank} or any(part.dtype != result.dtype for part in parts) or not _is_outermost(dim, result):
            return  # `cat` ignores empty tensors of other rank and promotes dtypes
        start = 0
        for reference, part in zip(call.args[0], parts, strict=True):
            if call.name == "stack":
                yield reference.number, partial(Tensor.select, dim=dim + 1, index=start)
                start += 1
            else:
                size = part.shape[dim]
                yield reference.number, partial(Tensor.narrow, dim=dim + 1, start=start, length=size)
                start += size


def _is_outermost(dim: int, value: RecordedValue) -> bool:
    """Whether the parts along a dimension are contiguous, as kernels write them."""
    return all(size == 1 for size in value.shape[:dim])
