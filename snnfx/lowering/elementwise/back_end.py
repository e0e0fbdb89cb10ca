"""What runs kernels: a back end writes, builds and launches them for one kind of device."""

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

WITH_TIME = frozenset(("sequence", "output", "saved", "grad_output", "grad_sequence"))
"""Kinds of operands with a value at each time step."""


@dataclass(frozen=True)
class KernelOperand:
    """One operand of a kernel: what it is, its number, and its dtype in memory."""

    kind: str
    index: int
    dtype: str

    @property
    def has_time(self) -> bool:
        """Whether it has a value at each time step."""
        return self.kind in WITH_TIME


@dataclass(frozen=True)
class WantedGradients:
    """Which gradients are wanted, by number: of inputs, of initial states, and sums for those of operands."""

    sequences: tuple[int, ...]
    initials: tuple[int, ...]
    sums: tuple[int, ...]

    def states(self, step: StepExpressions) -> list[int]:
        """The states whose gradient has to be carried from step to step."""
        carried: set[int] = set(self.initials)
        while True:
            read = {e.index for e in topological(self._roots(step, carried)) if e.op == "grad_state"} | carried
            if read == carried:
                return sorted(carried)
            carried = read

    def expressions(self, step: StepExpressions) -> list[Expression]:
        """What one step of the backward pass has to compute."""
        return self._roots(step, self.states(step))

    def _roots(self, step: StepExpressions, carried: Iterable[int]) -> list[Expression]:
        found = [step.grad_sequences[i] for i in self.sequences] + [step.grad_states[k] for k in sorted(carried)]
        return [e for e in found if e is not None] + [step.sums[i] for i in self.sums]


class BackEnd(ABC):
    """Kernels for one kind of device. What `write_*` gives is for `build`, `parts` and `run` of the same back end."""

    @abstractmethod
    def write_forward(self, step: StepExpressions, plan: SavePlan | None = None) -> Any:
        """The forward pass over a whole sequence, with `slots`; with a plan, it saves what the backward pass needs."""

    @abstractmethod
    def write_backward(self, step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> Any:
        """The backward pass over a whole sequence, in reverse."""

    @abstractmethod
    def build(self, source: Any, elements: int) -> None:
        """Make a kernel ready to run.

        Args:
            source: the kernel.
            elements: about how many a step has.

        Raises:
            LoweringRefused: it cannot be built here.
        """

    @abstractmethod
    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what a kernel writes."""

    @abstractmethod
    def parts(self, source: Any, elements: int, T: int) -> int:
        """How many partial sums over the elements a kernel writes (float64)."""

    @abstractmethod
    def run(self, source: Any, layout: Layout, T: int, operands: Sequence[Tensor | float]) -> None:
        """Launch a kernel.

        Args:
            source: the kernel.
            layout: of its operands.
            T: the number of time steps.
            operands: in the order of `source.slots`; a number stands for an operand that has it everywhere.
        """
