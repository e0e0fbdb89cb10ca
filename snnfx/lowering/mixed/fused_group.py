"""Fuse element-wise calls of one step into one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from snnfx.lowering.aten_recording import LoweringRefused, Recording
from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource, write_forward
from snnfx.lowering.elementwise.expressions import Builder, Expression, StepExpressions
from snnfx.lowering.elementwise.selected_values import SelectedValues
from snnfx.lowering.elementwise.translation import Translator, memory_dtype
from snnfx.lowering.mixed.call_kinds import without_leading_ones

__all__ = ["FusedGroup", "is_elementwise", "operand_dtype"]


class _Members(Translator):
    """Translates the calls of a group; all other varying values are inputs of its kernel."""

    def __init__(self, recording: Recording, shape: tuple[int, ...], members: set[int]) -> None:
        self.for_comparison = False
        self.recording, self.values = recording, recording.values
        self.builder = Builder()
        self.expressions: dict[int, Expression | LoweringRefused] = {}
        self.selected = SelectedValues(self.values, self.builder, self.expression)
        self.operands: dict[int, int] = {}
        self.shape, self.members = shape, members
        self.read: dict[int, int] = {}

    def _expression(self, number: int) -> Expression:
        value = self.values[number]
        if not value.varying or number in self.members:
            return super()._expression(number)
        if not self._fits(value.shape):
            raise LoweringRefused(f"a value of shape {list(value.shape)} does not fit {list(self.shape)}")
        memory = memory_dtype(value.dtype)
        index = self.read.setdefault(number, len(self.read))
        computed = "float32" if memory in ("float16", "bfloat16") else memory
        return self.builder.leaf("sequence", index, computed)

    def _fits(self, shape: Sequence[int]) -> bool:
        shape = without_leading_ones(shape)
        sizes = zip(reversed(shape), reversed(self.shape), strict=False)
        return len(shape) <= len(self.shape) and all(s in (1, size) for s, size in sizes)


def is_elementwise(recording: Recording, number: int) -> bool:
    """Whether a kernel can compute a value element by element from the operands of its call."""
    value = recording.values[number]
    assert value.call is not None
    try:
        memory_dtype(value.dtype)
        _Members(recording, without_leading_ones(value.shape), {number}).expression(number)
    except LoweringRefused:
        return False
    return True


class FusedGroup:
    """A fused kernel of one step.

    Args:
        recording: the recorded step.
        shape: the shape of its values, without leading ones.
        members: the values that it computes.
        made: the members that it writes; a value that is written to several buffers is repeated.
        added: the members that it adds to their sum over time.
    """

    def __init__(
        self,
        recording: Recording,
        shape: tuple[int, ...],
        members: set[int],
        made: Sequence[int],
        added: Sequence[int],
    ) -> None:
        translator = _Members(recording, shape, members)
        roots = [translator.expression(number) for number in made]
        dtypes = [memory_dtype(recording.values[number].dtype) for number in (*made, *added)]
        terms = [translator.expression(number) for number in added]
        reads = list(translator.read)
        builder = translator.builder
        for k, term in enumerate(terms):
            so_far = builder.leaf("sequence", len(reads) + k, term.dtype)
            roots.append(builder.make("add", (so_far, term), term.dtype))
        self.shape = shape
        self.reads, self.operands = reads, list(translator.operands)
        self.made, self.added = tuple(made), tuple(added)
        values = recording.values
        operand_dtypes = [values[number].dtype for number in self.operands]
        self.source: KernelSource = write_forward(
            StepExpressions(
                sequences=(*(memory_dtype(values[n].dtype) for n in reads), *dtypes[len(made) :]),
                operands=tuple(memory_dtype(operand_dtype(d)) for d in operand_dtypes),
                scalars=tuple(len(values[n].shape) == 0 for n in self.operands),
                state_dtypes=(),
                output_dtypes=tuple(dtypes),
                outputs=tuple(roots),
                next_states=(),
            )
        )

    def read_location(self, index: int) -> int | tuple[str, int]:
        """The value (or, as `("sum", value)`, the partial sum) behind operand `index` of kind "sequence"."""
        return self.reads[index] if index < len(self.reads) else ("sum", self.added[index - len(self.reads)])

    def write_location(self, index: int) -> int | tuple[str, int]:
        """The value (or, as `("sum", value)`, the partial sum) behind operand `index` of kind "output"."""
        return self.made[index] if index < len(self.made) else ("sum", self.added[index - len(self.made)])


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel reads an operand: its own, or float64 if kernels have no such dtype."""
    try:
        memory_dtype(dtype)
    except LoweringRefused:
        return torch.float64
    return dtype
