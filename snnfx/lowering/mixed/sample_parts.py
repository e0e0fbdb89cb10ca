"""Divide the samples of a loop among threads that never wait for each other.

This is legal if all operations are independent between samples: every operation writes and reads the values that
the loop computes at the same position of the first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snnfx.lowering.mixed.operations import Convolution, Launch, Operation, Product
from snnfx.lowering.mixed.ring_buffers import RingBuffer

__all__ = ["SampleParts", "plan_parts"]


@dataclass(frozen=True)
class SampleParts:
    """The parts of the samples.

    Args:
        samples: the number of samples.
        samples_of_block: samples that an element-wise kernel computes in one block.
        count: the number of parts.
    """

    samples: int
    samples_of_block: int
    count: int


_ONE_PART = SampleParts(1, 1, 1)


def plan_parts(operations: Sequence[Operation], threads: int) -> SampleParts:
    """Parts of whole blocks for a number of threads; one part if samples are not independent."""
    samples = next((o.out.tensor.shape[1] for o in operations if isinstance(o, Product | Convolution)), 1)
    if threads == 1 or samples == 1 or not _are_independent(operations, samples):
        return _ONE_PART
    of_block = -(-samples // threads)
    for operation in operations:
        if isinstance(operation, Launch):
            of_block = min(of_block, operation.group.source.block // (operation.layout.elements // samples))
    return SampleParts(samples, of_block, threads) if of_block else _ONE_PART


def _are_independent(operations: Sequence[Operation], samples: int) -> bool:
    written = {id(ring.base.tensor) for operation in operations for ring in operation.writes()}
    for operation in operations:
        rank = len(operation.group.shape) if isinstance(operation, Launch) else None
        if isinstance(operation, Launch) and operation.group.shape[:1] != (samples,):
            return False
        for ring in (*operation.writes(), *operation.reads()):
            if id(ring.base.tensor) in written and not _is_by_sample(ring, samples, rank):
                return False
        if not isinstance(operation, Launch) and any(
            ring.tensor.shape[1:2] != (samples,) for ring in operation.writes()
        ):
            return False
    return True


def _is_by_sample(ring: RingBuffer, samples: int, rank: int | None) -> bool:
    """Whether sample n of a value lies within sample n of the buffer that it is a view of."""
    tensor, base = ring.tensor, ring.base.tensor
    if tensor.shape[1:2] != (samples,) or base.shape[1:2] != (samples,) or rank not in (None, tensor.dim() - 1):
        return False
    offset = (tensor.data_ptr() - base.data_ptr()) // tensor.element_size()
    return tensor.stride(1) == base.stride(1) and (offset < base.stride(1) or tensor[0].numel() == 0)
