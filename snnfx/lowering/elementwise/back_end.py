"""Interface of a back end, which writes, builds and launches kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.expressions import Expression, StepExpressions, topological
from snnfx.lowering.elementwise.operand_layout import Layout
from snnfx.lowering.elementwise.saved_values import SavePlan

__all__ = ["BackEnd", "KernelOperand", "WantedGradients"]

KINDS_WITH_TIME = frozenset(("sequence", "output", "saved", "grad_output", "grad_sequence"))
"""Kinds of operands with a value at each time step."""


@dataclass(frozen=True)
class KernelOperand:
    """One operand of a kernel.

    Args:
        kind: e.g. "sequence", "initial", "output" or "grad_state".
        index: its number among the operands of this kind.
        dtype: its dtype in memory.
    """

    kind: str
    index: int
    dtype: str

    @property
    def has_time(self) -> bool:
        """Whether it has a value at each time step."""
        return self.kind in KINDS_WITH_TIME


@dataclass(frozen=True)
class WantedGradients:
    """The gradients that a backward kernel computes.

    Args:
        sequences: indices of inputs.
        initials: indices of initial states.
        sums: indices of `StepExpressions.sums`.
    """

    sequences: tuple[int, ...]
    initials: tuple[int, ...]
    sums: tuple[int, ...]

    def states(self, step: StepExpressions) -> list[int]:
        """The states whose gradients are loop-carried."""
        carried: set[int] = set(self.initials)
        while True:
            read = {e.index for e in topological(self._roots(step, carried)) if e.op == "grad_state"} | carried
            if read == carried:
                return sorted(carried)
            carried = read

    def expressions(self, step: StepExpressions) -> list[Expression]:
        """The expressions that one step of the backward pass computes."""
        return self._roots(step, self.states(step))

    def _roots(self, step: StepExpressions, carried: Iterable[int]) -> list[Expression]:
        gradients = [step.grad_sequences[i] for i in self.sequences] + [step.grad_states[k] for k in sorted(carried)]
        return [e for e in gradients if e is not None] + [step.sums[i] for i in self.sums]


class BackEnd(ABC):
    """Writes, builds and runs kernels for one kind of device.

    A source belongs to the back end that wrote it.
    """

    @abstractmethod
    def write_forward(self, step: StepExpressions, plan: SavePlan | None = None) -> Any:
        """Write the kernel of the forward pass over a sequence.

        With a plan, the kernel saves values for backward. The source has a list `slots` of `KernelOperand`s.
        """

    def write_forward_in_bits(self, step: StepExpressions) -> Any:
        """Write the kernel of inference that writes its outputs, 0 or 1, as one bit each; None if there is none."""
        return None

    @abstractmethod
    def write_backward(self, step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> Any:
        """Write the kernel of the backward pass over a sequence, in reverse."""

    @abstractmethod
    def build(self, source: Any, elements: int) -> None:
        """Compile a kernel.

        Args:
            source: the kernel.
            elements: the approximate number of elements of a step.

        Raises:
            LoweringRefused: it cannot be compiled.
        """

    @abstractmethod
    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a tensor that a kernel writes."""

    @abstractmethod
    def parts(self, source: Any, elements: int, T: int) -> int:
        """The number of partial sums over the elements that a kernel writes (float64)."""

    @abstractmethod
    def run(self, source: Any, layout: Layout, T: int, operands: Sequence[Tensor | float]) -> None:
        """Launch a kernel.

        Args:
            source: the kernel.
            layout: the layout of its operands.
            T: the number of time steps.
            operands: the operands in the order of `source.slots`; a number stands for a constant operand.
        """
