"""Run the operations of all iterations of a loop in one call of compiled code."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.mixed.loop_source import LOOPS
from snnfx.lowering.mixed.operations import Addition, Assembly, Call, Copy, Launch, Operation, Product
from snnfx.lowering.mixed.ring_buffers import RingBuffer
from snnfx.lowering.mixed.sample_parts import SampleParts, plan_parts
from snnfx.lowering.nonzero_lists import VECTOR_BYTES

__all__ = ["build_loop", "reason_against_compiling", "run_compiled"]

_DTYPES = (torch.float32, torch.float64)
_PRODUCT, _KERNEL, _COPY, _SUM = range(4)
_MIN_PARALLEL_WORK = 1 << 18
"""Multiplications and element-wise results of a call from which on several threads share the samples."""


def build_loop(dtype: torch.dtype) -> None:
    """Compile the loop for products of a dtype.

    Raises:
        LoweringRefused: it cannot be compiled.
    """
    if dtype in _DTYPES:
        load(LOOPS[dtype.itemsize])


def reason_against_compiling(operations: Sequence[Operation]) -> str:
    """Why Python code has to run each iteration, as a clause; "" if compiled code can."""
    dtypes = {o.out.tensor.dtype for o in operations if isinstance(o, Product)}
    dtypes |= {o.term.tensor.dtype for o in operations if isinstance(o, Addition)}
    if len(dtypes) > 1 or any(dtype not in _DTYPES for dtype in dtypes):
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"its products are computed in {names}"
    for operation in operations:
        if isinstance(operation, Call):
            return f"PyTorch computes `{operation.name}` in each step"
        if isinstance(operation, Product) and not _is_row_major(operation.left.tensor):
            return "a product reads a value whose rows are not consecutive in memory"
        copies = operation.copies if isinstance(operation, Assembly) else [operation]
        if any(isinstance(copy, Copy) and not _copies_rows(copy) for copy in copies):
            return "a value is copied to another dtype or layout"
        if isinstance(operation, Addition) and not all(
            ring.tensor[0].is_contiguous() and ring.tensor.shape[1:] == operation.following.tensor.shape[1:]
            for ring in (operation.term, operation.so_far, operation.following)
        ):
            return "a value that is not consecutive in memory is summed"
    return ""


def _is_row_major(tensor: Tensor) -> bool:
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _copies_rows(copy: Copy) -> bool:
    """Whether each row of the first dimension of a step is a copy of consecutive bytes."""
    source, target = copy.source.tensor, copy.target.tensor
    return (source.dtype, source.shape[1:]) == (target.dtype, target.shape[1:]) and (
        source.numel() == 0
        or target.numel() == 0
        or all(t.dim() < 2 or t[0, 0].is_contiguous() for t in (source, target))
    )


def run_compiled(operations: Sequence[Operation], T: int, by_events: bool) -> float | None:
    """Run all iterations.

    Args:
        operations: the operations of an iteration; `reason_against_compiling` returns "" for them.
        T: the number of iterations.
        by_events: whether products may visit only the elements of their operands that are not zero.

    Returns:
        The fraction of the operands of products that was not zero; None if it was not counted.
    """
    operations = [part for o in operations for part in (o.copies if isinstance(o, Assembly) else [o])]
    products = [o for o in operations if isinstance(o, Product)]
    dtype = products[0].out.tensor.dtype if products else torch.float32
    dtypes = [o.term.tensor.dtype for o in operations if isinstance(o, Addition)]
    library = load(LOOPS[(dtypes[0] if dtypes and not products else dtype).itemsize])
    parts = plan_parts(operations, _threads(operations, T))
    packing = _Packing(parts, by_events)
    words = [word for operation in operations for word in packing.words(operation)]
    table = (ctypes.c_int64 * len(words))(*words)
    active = torch.zeros(parts.count, len(operations), dtype=torch.int64)
    runtime = openmp() if parts.count > 1 else None
    longest = max((o.matrix.shape[0] for o in products), default=0)
    of_call = (
        *(T, ctypes.addressof(table), len(operations)),
        *(parts.samples, parts.samples_of_block, parts.count, longest),
        *(runtime[0] if runtime else 0, 0, active.data_ptr()),
    )
    library.run((ctypes.c_int64 * len(of_call))(*of_call))
    seen, size = active.sum(0).tolist(), len(words) // max(1, len(operations))
    counted = [k for k, o in enumerate(operations) if isinstance(o, Product) and table[k * size + _BY_EVENTS]]
    elements = sum(T * operations[k].left.tensor[0].numel() for k in counted)  # type: ignore[attr-defined]
    return sum(seen[k] for k in counted) / elements if elements else None


def _threads(operations: Sequence[Operation], T: int) -> int:
    work = 0
    for operation in operations:
        if isinstance(operation, Product):
            work += operation.out.tensor[0].numel() * operation.matrix.shape[0]
        elif isinstance(operation, Launch):
            work += operation.layout.elements
    return torch.get_num_threads() if work * T >= _MIN_PARALLEL_WORK and openmp() is not None else 1


_BY_EVENTS = 21
"""The word of `struct Operation` that says whether a product counted the elements that are not zero."""


class _Packing:
    """Packs operations into the words of `struct Operation`, and keeps their tensors alive."""

    def __init__(self, parts: SampleParts, by_events: bool) -> None:
        self.parts, self.by_events = parts, by_events
        self.alive: list[Tensor] = []

    def words(self, operation: Operation) -> tuple[int, ...]:
        """The words of an operation."""
        if isinstance(operation, Product):
            return self._product(operation)
        if isinstance(operation, Launch):
            return self._launch(operation)
        if isinstance(operation, Copy):
            source, target = operation.source.tensor, operation.target.tensor
            size = target.element_size()
            count = target.shape[1] if target.dim() > 1 else 1
            width = target[0].numel() // max(count, 1) * size
            steps = (t.stride(1) * size if t.dim() > 1 else width for t in (target, source))
            rings = (*_ring(operation.target), *_ring(operation.source), *_NO_RING)
            return (_COPY, count, *rings, *steps, width, *(0,) * 13)
        assert isinstance(operation, Addition)
        shape = operation.following.tensor.shape[1:]
        count = shape[0] if shape else 1
        rings = (*_ring(operation.following), *_ring(operation.so_far), *_ring(operation.term))
        return (_SUM, count, *rings, 0, 0, math.prod(shape) // max(count, 1), *(0,) * 13)

    def _product(self, operation: Product) -> tuple[int, ...]:
        left, out, matrix = operation.left.tensor, operation.out.tensor, operation.matrix.resolve_neg()
        samples, width = out.shape[1:]
        lanes = VECTOR_BYTES // out.element_size()
        packed = torch.empty(
            matrix.shape[0] * (-(-width // lanes) * lanes) * out.element_size() + 64, dtype=torch.uint8
        )
        address = -(-packed.data_ptr() // 64) * 64
        bias, bias_step = 0, 0
        if operation.bias is not None:
            terms = operation.bias.resolve_neg().expand(samples, width)
            has_rows = terms.stride(0) != 0 and samples > 1
            terms = terms.contiguous() if has_rows else terms[:1].contiguous()
            self.alive.append(terms)
            bias, bias_step = terms.data_ptr(), width if has_rows else 0
        self.alive += [matrix, packed]
        return (
            *(_PRODUCT, samples, *_ring(operation.out), *_ring(operation.left), *_NO_RING),
            *(width, left.stride(1), width, matrix.shape[0], bias, bias_step),
            *(matrix.data_ptr(), *matrix.stride(), address, int(self.by_events)),
            *(0,) * 5,
        )

    def _launch(self, operation: Launch) -> tuple[int, ...]:
        source, words = operation.group.source, list(operation.words)
        if self.parts.count > 1:
            words[_BLOCK] = self.parts.samples_of_block * (operation.layout.elements // self.parts.samples)
        table = torch.tensor(words, dtype=torch.int64).repeat(self.parts.count, 1)
        addresses = torch.tensor([(word, *_ring(ring)) for word, ring in operation.addresses], dtype=torch.int64)
        self.alive += [table, addresses]
        run_part = ctypes.cast(load(source).run_part, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
        called = (run_part, table.data_ptr(), len(words), addresses.data_ptr(), len(operation.addresses))
        return (_KERNEL, 0, *_NO_RING * 3, *(0,) * 11, *called)


_BLOCK = 2
"""The word of the struct of arguments of a kernel that has the elements of a block."""

_NO_RING = (0, 0, 0)


def _ring(ring: RingBuffer) -> tuple[int, int, int]:
    return ring.tensor.data_ptr(), ring.tensor.stride(0) * ring.tensor.element_size(), ring.rows.data_ptr()
