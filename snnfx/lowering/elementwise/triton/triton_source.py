"""`TritonSource`: text and parameters of a generated Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from snnfx.lowering.elementwise.back_end import KernelOperand

__all__ = ["OperandForm", "TritonSource"]


@dataclass(frozen=True)
class OperandForm:
    """The properties of a layout on which the text of a kernel depends.

    Args:
        modes: for each operand "number" (constant, passed as an argument), "dense" (the elements of a step are
            consecutive) or "strided".
        dims: number of dimensions of a step, if an operand is strided.
        wide: whether offsets within a step need 64 bits.
    """

    modes: tuple[str, ...]
    dims: int = 1
    wide: bool = False


@dataclass(eq=False)
class TritonSource:
    """A generated kernel.

    Args:
        slots: its operands, in order.
        literals: the numbers that are passed as arguments.
        write: writes its text for a form.
        uses: the functions of the device library that it calls.
    """

    slots: tuple[KernelOperand, ...]
    literals: tuple[float, ...]
    write: Callable[[OperandForm], str]
    uses: frozenset[str]
    texts: dict[OperandForm, str] = field(default_factory=dict)

    def text(self, form: OperandForm) -> str:
        """The Triton source of a function `kernel` with `parameters(form)`."""
        if form not in self.texts:
            self.texts[form] = self.write(form)
        return self.texts[form]

    @property
    def default_form(self) -> OperandForm:
        """The form of a call with dense operands that starts from the reset state."""
        return OperandForm(
            tuple("number" if slot.kind in ("initial", "grad_final") else "dense" for slot in self.slots)
        )

    def parameters(self, form: OperandForm) -> list[str]:
        """The annotated parameters of the kernel: operands, sizes, numbers, elements of a step, T, BLOCK.

        For an operand: its number or pointer, its time stride if it changes with time, then its other strides.
        """
        parameters: list[str] = []
        for number, (slot, mode) in enumerate(zip(self.slots, form.modes, strict=True)):
            parameters.append(f'f{number}: "fp64"' if mode == "number" else f"p{number}")
            if mode != "number" and slot.has_time:
                parameters.append(f'd{number}: "i64"')
            if mode == "strided":
                parameters += [f"s{number}_{d}" for d in range(form.dims)]
        parameters += [f"n{d}" for d in range(1, form.dims)]
        parameters += [f'k{index}: "fp64"' for index in range(len(self.literals))]
        return [*parameters, "elements", "T", "BLOCK: tl.constexpr"]
