"""The structs of arguments of a compiled time loop, filled from its operations."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load
from snnfx.lowering.mixed.convolution_arguments import convolution_struct
from snnfx.lowering.mixed.copied_rows import plan_copy
from snnfx.lowering.mixed.operations import Addition, Convolution, Copy, Launch, Operation, Product
from snnfx.lowering.mixed.ring_buffers import RingBuffer
from snnfx.lowering.mixed.sample_parts import SampleParts
from snnfx.lowering.nonzero_lists import VECTOR_BYTES
from snnfx.ops.buffer_pool import pool

__all__ = ["ArgumentTable", "LoopArguments"]

_Integer = ctypes.c_int64
_PRODUCT, _KERNEL, _COPY, _SUM, _CONVOLUTION = range(5)
_BLOCK = 2
"""The word of the struct of arguments of a fused kernel that has the elements of a block."""


class _Ring(ctypes.Structure):
    _fields_ = [(name, _Integer) for name in ("data", "bytes", "rows")]


class _Address(ctypes.Structure):
    _fields_ = [("word", _Integer), ("ring", _Ring)]


class _Operation(ctypes.Structure):
    _fields_ = [
        *((name, _Integer) for name in ("kind", "count")),
        *((name, _Ring) for name in ("out", "input", "other")),
        *((name, _Integer) for name in ("out_step", "in_step", "width", "inputs", "bias", "bias_step", "matrix")),
        *((name, _Integer) for name in ("matrix_row", "matrix_column", "packed", "by_events", "run_part", "words")),
        *((name, _Integer) for name in ("word_count", "addresses", "address_count", "convolution", "row_count")),
        *((name, _Integer) for name in ("row_from", "row_to")),
    ]


class LoopArguments(ctypes.Structure):
    """The struct `Args` of `snnfx.lowering.mixed.loop_source`."""

    _fields_ = [
        *((name, _Integer) for name in ("T", "operations", "operation_count", "samples", "samples_of_block")),
        *((name, _Integer) for name in ("parts", "longest", "parallel", "next", "active")),
    ]


class ArgumentTable:
    """The structs of the operations of an iteration, with the tensors whose addresses they contain.

    Args:
        operations: the operations.
        parts: the parts of the samples.
        by_events: whether products may visit only the elements of their operands that are not zero.

    Attributes:
        structs: one for each operation.
        copies_given: whether a struct has the address of a copy of a given tensor.
    """

    def __init__(self, operations: list[Operation], parts: SampleParts, by_events: bool) -> None:
        self.parts, self.by_events = parts, by_events
        self.copies_given = False
        self._alive: list[Any] = list(operations)
        self._addresses: list[Any] = []
        self.structs = (_Operation * len(operations))(*[self._struct(operation) for operation in operations])

    def rings(self) -> Iterator[_Ring]:
        """The structs that have the addresses of the values of the loop."""
        for struct in self.structs:
            yield from (struct.out, struct.input, struct.other)
        for addresses in self._addresses:
            yield from (address.ring for address in addresses)

    def _struct(self, operation: Operation) -> _Operation:
        if isinstance(operation, Product):
            return self._product(operation)
        if isinstance(operation, Convolution):
            return self._convolution(operation)
        if isinstance(operation, Launch):
            return self._launch(operation)
        if isinstance(operation, Copy):
            return self._copy(operation)
        assert isinstance(operation, Addition)
        shape = operation.following.tensor.shape[1:]
        count = shape[0] if shape else 1
        return _Operation(
            kind=_SUM,
            count=count,
            out=_ring(operation.following),
            input=_ring(operation.so_far),
            other=_ring(operation.term),
            width=math.prod(shape) // max(count, 1),
        )

    def _product(self, operation: Product) -> _Operation:
        left, out, matrix = operation.left.tensor, operation.out.tensor, operation.matrix.resolve_neg()
        inputs, width, lanes = matrix.shape[0], matrix.shape[1], VECTOR_BYTES // out.element_size()
        packed = pool.empty(((inputs * -(-width // lanes) + 1) * lanes,), (1,), out.dtype)
        bias = self._bias(operation)
        self.copies_given |= matrix is not operation.matrix
        self._alive += [matrix, packed, bias]
        return _Operation(
            kind=_PRODUCT,
            count=out.shape[1],
            out=_ring(operation.out),
            input=_ring(operation.left),
            out_step=width,
            in_step=left.stride(1),
            width=width,
            inputs=inputs,
            bias=0 if bias is None else bias.data_ptr(),
            bias_step=0 if bias is None or len(bias) == 1 else width,
            matrix=matrix.data_ptr(),
            matrix_row=matrix.stride(0),
            matrix_column=matrix.stride(1),
            packed=-(-packed.data_ptr() // VECTOR_BYTES) * VECTOR_BYTES,
            by_events=self.by_events,
        )

    def _bias(self, operation: Product) -> Tensor | None:
        """The bias as one row for all samples or one for each."""
        if operation.bias is None:
            return None
        rows = operation.bias.resolve_neg().expand(operation.out.tensor.shape[1:])
        used = rows[:1] if rows.stride(0) == 0 else rows
        self.copies_given |= operation.bias.is_neg() or not used.is_contiguous()
        return used.contiguous()

    def _convolution(self, operation: Convolution) -> _Operation:
        weight = operation.weight.resolve_neg()
        bias = None if operation.bias is None else operation.bias.resolve_neg().contiguous()
        self.copies_given |= weight is not operation.weight or bias is not operation.bias
        struct, buffers = convolution_struct(operation, weight, self.parts.count)
        packed = pool.empty((weight.numel(),), (1,), weight.dtype)
        self._alive += [weight, bias, struct, buffers, packed]
        return _Operation(
            kind=_CONVOLUTION,
            count=operation.out.tensor.shape[1],
            out=_ring(operation.out),
            input=_ring(operation.input),
            out_step=operation.out.tensor.stride(1),
            in_step=operation.input.tensor.stride(1),
            bias=0 if bias is None else bias.data_ptr(),
            matrix=weight.data_ptr(),
            packed=packed.data_ptr(),
            convolution=ctypes.addressof(struct),
        )

    def _copy(self, operation: Copy) -> _Operation:
        rows = plan_copy(operation)
        assert rows is not None
        self._alive.append(rows)
        return _Operation(
            kind=_COPY,
            count=rows.samples,
            out=_ring(operation.target),
            input=_ring(operation.source),
            out_step=rows.target_step,
            in_step=rows.source_step,
            width=rows.width,
            row_count=len(rows.source),
            row_from=rows.source.data_ptr(),
            row_to=rows.target.data_ptr(),
        )

    def _launch(self, operation: Launch) -> _Operation:
        words = list(operation.words)
        if self.parts.count > 1:
            words[_BLOCK] = self.parts.samples_of_block * (operation.layout.elements // self.parts.samples)
        structs = torch.tensor(words * self.parts.count, dtype=torch.int64, device="cpu")
        pairs = operation.addresses
        addresses = (_Address * len(pairs))(*[_Address(word, _ring(ring)) for word, ring in pairs])
        self._alive.append(structs)
        self._addresses.append(addresses)
        function: Any = load(operation.group.source).run_part
        return _Operation(
            kind=_KERNEL,
            run_part=ctypes.cast(function, ctypes.c_void_p).value or 0,
            words=structs.data_ptr(),
            word_count=len(words),
            addresses=ctypes.addressof(addresses),
            address_count=len(pairs),
        )


def _ring(ring: RingBuffer) -> _Ring:
    return _Ring(ring.tensor.data_ptr(), ring.tensor.stride(0) * ring.tensor.element_size(), ring.rows.data_ptr())
