"""The operations of an iteration of a loop, on ring buffers.

Each operation can run one iteration from Python. `snnfx.lowering.mixed.compiled_loop` runs the operations of all
iterations in one call, if all of them are of a kind that it knows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load
from snnfx.lowering.elementwise.operand_layout import Layout
from snnfx.lowering.mixed.convolution_calls import Settings
from snnfx.lowering.mixed.fused_group import FusedGroup
from snnfx.lowering.mixed.ring_buffers import RingBuffer

__all__ = ["Addition", "Assembly", "Call", "Convolution", "Copy", "Iteration", "Launch", "Operation", "Product"]

_STRUCTS_AT_ONCE = 1024
"""Iterations for which the argument structs of a kernel are built at once."""

Iteration = Callable[[int], None]


class Operation(ABC):
    """One operation of each iteration."""

    @abstractmethod
    def iteration(self, T: int) -> Iteration:
        """A function that runs the operation at an iteration, given its number."""

    @abstractmethod
    def writes(self) -> list[RingBuffer]:
        """The ring buffers whose rows it changes, or that alternate with them."""

    @abstractmethod
    def reads(self) -> list[RingBuffer]:
        """The other ring buffers that it reads; it may contain some of those that it writes."""


@dataclass
class Product(Operation):
    """A matrix product with a matrix that is the same at each iteration.

    Args:
        left: `[R, N, K]`.
        matrix: `[K, M]`.
        bias: a tensor that can be expanded to `[N, M]`, or None.
        out: `[R, N, M]`, contiguous.
    """

    left: RingBuffer
    matrix: Tensor
    bias: Tensor | None
    out: RingBuffer

    def writes(self) -> list[RingBuffer]:
        return [self.out]

    def reads(self) -> list[RingBuffer]:
        return [self.left]

    def iteration(self, T: int) -> Iteration:
        left, matrix, bias, out = self.left.steps(), self.matrix, self.bias, self.out.steps()

        def product(i: int) -> None:
            if bias is None:
                torch.mm(left[i], matrix, out=out[i])
            else:
                torch.addmm(bias, left[i], matrix, out=out[i])

        return product


@dataclass
class Launch(Operation):
    """The launch of a fused kernel; the argument structs of its iterations differ only in addresses.

    Args:
        group: the kernel.
        layout: the layout of its operands.
        words: the struct of arguments.
        addresses: the word of the struct that has the address of each ring buffer.
        written: the ring buffers that it writes.
        operands: the other operands, to keep them alive.
    """

    group: FusedGroup
    layout: Layout
    words: list[int]
    addresses: list[tuple[int, RingBuffer]]
    written: list[RingBuffer]
    operands: list[Tensor]

    def writes(self) -> list[RingBuffer]:
        return self.written

    def reads(self) -> list[RingBuffer]:
        return [ring for _, ring in self.addresses]

    def iteration(self, T: int) -> Iteration:
        run = load(self.group.source).run
        count = min(T, _STRUCTS_AT_ONCE)
        table = torch.tensor(self.words, dtype=torch.int64, device="cpu").repeat(count, 1)
        start, step = table.data_ptr(), table.stride(0) * table.element_size()
        filled = -1  # the first iteration whose addresses are in the table: a run may be repeated

        def launch(i: int) -> None:
            nonlocal filled
            row = i % count
            if i - row != filled:
                filled = i - row
                for word, ring in self.addresses:
                    size = ring.tensor.stride(0) * ring.tensor.element_size()
                    part = ring.rows[i : i + count]
                    table[: len(part), word] = part * size + ring.tensor.data_ptr()
            run(start + row * step)

        return launch


@dataclass
class Copy(Operation):
    """A copy of a value to another ring buffer; the value may be broadcast."""

    source: RingBuffer
    target: RingBuffer

    def writes(self) -> list[RingBuffer]:
        return [self.target]

    def reads(self) -> list[RingBuffer]:
        return [self.source]

    def iteration(self, T: int) -> Iteration:
        source, target = self.source.steps(), self.target.steps()

        def copy(i: int) -> None:
            target[i].copy_(source[i])

        return copy


@dataclass
class Addition(Operation):
    """The addition of a value to its partial sum over time."""

    term: RingBuffer
    so_far: RingBuffer
    following: RingBuffer

    def writes(self) -> list[RingBuffer]:
        return [self.following, self.so_far]

    def reads(self) -> list[RingBuffer]:
        return [self.term]

    def iteration(self, T: int) -> Iteration:
        term, so_far, following = self.term.steps(), self.so_far.steps(), self.following.steps()

        def add(i: int) -> None:
            torch.add(so_far[i], term[i], out=following[i])

        return add


@dataclass
class Assembly(Operation):
    """Copies that make one value: a concatenation, or a value between zeros.

    Args:
        copies: the copies, in order.
    """

    copies: list[Copy]

    def writes(self) -> list[RingBuffer]:
        return [copy.target for copy in self.copies]

    def reads(self) -> list[RingBuffer]:
        return [copy.source for copy in self.copies]

    def iteration(self, T: int) -> Iteration:
        iterations = [copy.iteration(T) for copy in self.copies]

        def assemble(i: int) -> None:
            for copy in iterations:
                copy(i)

        return assemble


@dataclass
class Call(Operation):
    """Any other operator, computed by PyTorch.

    Args:
        name: its name, e.g. "convolution".
        operands: the arguments that change between iterations.
        run: runs the operator on the operands and writes its results to `out`.
        out: where its results are written.
    """

    name: str
    operands: list[RingBuffer]
    run: Callable[[Sequence[Tensor], Sequence[Tensor]], None]
    out: list[RingBuffer]

    def writes(self) -> list[RingBuffer]:
        return self.out

    def reads(self) -> list[RingBuffer]:
        return self.operands

    def iteration(self, T: int) -> Iteration:
        operands, out, run = [r.steps() for r in self.operands], [r.steps() for r in self.out], self.run

        def call(i: int) -> None:
            run([steps[i] for steps in operands], [steps[i] for steps in out])

        return call


@dataclass
class Convolution(Operation):
    """A convolution with a weight that is the same at each iteration, or the gradient of its input.

    Args:
        input: `[R, N, C, *]`.
        weight: the weight.
        bias: `[C]`, or None.
        settings: the settings.
        out: `[R, N, C, *]`, contiguous.
        call: the call of PyTorch that computes the same.
    """

    input: RingBuffer
    weight: Tensor
    bias: Tensor | None
    settings: Settings
    out: RingBuffer
    call: Call

    @property
    def work(self) -> int:
        """Multiplications of a step."""
        of_group = self.input.tensor.shape[2] // self.settings.groups
        return self.out.tensor[0].numel() * of_group * math.prod(self.settings.kernel)

    def writes(self) -> list[RingBuffer]:
        return [self.out]

    def reads(self) -> list[RingBuffer]:
        return [self.input]

    def iteration(self, T: int) -> Iteration:
        return self.call.iteration(T)
