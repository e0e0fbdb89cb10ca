"""Run the operations of all iterations of a loop in one call of compiled code."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.mixed.copied_rows import plan_copy
from snnfx.lowering.mixed.loop_arguments import ArgumentTable, LoopArguments
from snnfx.lowering.mixed.loop_source import LOOPS
from snnfx.lowering.mixed.operations import Addition, Assembly, Call, Convolution, Copy, Launch, Operation, Product
from snnfx.lowering.mixed.relocation import Relocation
from snnfx.lowering.mixed.sample_parts import plan_parts

__all__ = ["CompiledLoop", "build_loop", "reason_against_compiling"]

_DTYPES = (torch.float32, torch.float64)
_MIN_PARALLEL_WORK = 1 << 18
"""Multiplications and element-wise results of a call from which on several threads share the samples."""


def build_loop(dtype: torch.dtype) -> None:
    """Compile the loop for products and sums of a dtype.

    Raises:
        LoweringRefused: it cannot be compiled.
    """
    if dtype in _DTYPES:
        load(LOOPS[dtype.itemsize])


def reason_against_compiling(operations: Sequence[Operation]) -> str:
    """Why Python code has to run each iteration, as a clause; "" if compiled code can."""
    dtypes = _dtypes_of(operations)
    if len(dtypes) > 1 or any(dtype not in _DTYPES for dtype in dtypes):
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its products are computed in {names}"
    for operation in operations:
        if isinstance(operation, Call):
            return f"PyTorch computes `{operation.name}` in each step"
        if isinstance(operation, Product) and not _is_row_major(operation.left.tensor):
            return "a product reads a value whose rows are not consecutive in memory"
        if isinstance(operation, Addition) and not all(
            ring.tensor[0].is_contiguous() and ring.tensor.shape[1:] == operation.following.tensor.shape[1:]
            for ring in (operation.term, operation.so_far, operation.following)
        ):
            return "a value that is not consecutive in memory is summed"
    if any(isinstance(copy, Copy) and plan_copy(copy) is None for copy in _expanded(operations)):
        return "a value is copied to another dtype or layout"
    return ""


def _dtypes_of(operations: Sequence[Operation]) -> set[torch.dtype]:
    """The dtypes of products, convolutions and sums."""
    dtypes = {o.out.tensor.dtype for o in operations if isinstance(o, Product | Convolution)}
    return dtypes | {o.following.tensor.dtype for o in operations if isinstance(o, Addition)}


def _expanded(operations: Sequence[Operation]) -> list[Operation]:
    """The operations, with copies for each assembled value."""
    return [part for o in operations for part in (o.copies if isinstance(o, Assembly) else [o])]


def _is_row_major(tensor: Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


class CompiledLoop:
    """The operations of all iterations with their arguments, for one call of compiled code.

    Args:
        operations: the operations of an iteration; `reason_against_compiling` returns "" for them.
        T: the number of iterations.
        by_events: whether products may visit only the elements of their operands that are not zero.

    Attributes:
        copies_given: whether it reads a copy of a given tensor.
    """

    def __init__(self, operations: Sequence[Operation], T: int, by_events: bool) -> None:
        operations = _expanded(operations)
        (dtype,) = _dtypes_of(operations) or {torch.float32}
        parts = plan_parts(operations, _threads(operations, T))
        self._table = ArgumentTable(operations, parts, by_events)
        self._active = torch.zeros(parts.count, len(operations), dtype=torch.int64, device="cpu")
        runtime = openmp() if parts.count > 1 else None
        self._arguments = LoopArguments(
            T=T,
            operations=ctypes.addressof(self._table.structs),
            operation_count=len(operations),
            samples=parts.samples,
            samples_of_block=parts.samples_of_block,
            parts=parts.count,
            longest=max((o.matrix.shape[0] for o in operations if isinstance(o, Product)), default=0),
            parallel=runtime[0] if runtime else 0,
            active=self._active.data_ptr(),
        )
        self._run = load(LOOPS[dtype.itemsize]).run
        self._products = [
            (k, T * math.prod(o.left.tensor.shape[1:])) for k, o in enumerate(operations) if isinstance(o, Product)
        ]
        self._by_events = by_events
        self.copies_given = self._table.copies_given

    def relocation(self, stand_ins: Iterable[Tensor]) -> Relocation:
        """The places of the addresses of tensors that are in other memory at each run."""
        return Relocation(self._table.rings(), stand_ins)

    def run(self) -> float | None:
        """Run all iterations.

        Returns:
            The fraction of the operands of products that was not zero; None if it was not counted.
        """
        self._arguments.next = 0
        structs = self._table.structs
        if self._by_events and self._products:
            self._active.zero_()
            for k, _ in self._products:
                structs[k].by_events = True  # the code clears it where a matrix is not finite
        self._run(ctypes.byref(self._arguments))
        counted = [(k, count) for k, count in self._products if structs[k].by_events]
        elements = sum(count for _, count in counted)
        if not elements:
            return None
        seen = self._active.sum(0).tolist()
        return float(sum(seen[k] for k, _ in counted) / elements)


def _threads(operations: Sequence[Operation], T: int) -> int:
    work = 0
    for operation in operations:
        if isinstance(operation, Product):
            work += operation.out.tensor[0].numel() * operation.matrix.shape[0]
        elif isinstance(operation, Convolution):
            work += operation.work
        elif isinstance(operation, Launch):
            work += operation.layout.elements
    return torch.get_num_threads() if work * T >= _MIN_PARALLEL_WORK and openmp() is not None else 1
