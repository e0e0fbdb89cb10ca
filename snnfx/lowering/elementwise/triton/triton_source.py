"""A generated Triton kernel: its text for each form of its operands, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from snnfx.lowering.elementwise.back_end import KernelOperand

__all__ = ["OperandForm", "TritonSource"]


@dataclass(frozen=True)
class OperandForm:
    """What of a layout the text of a kernel depends on.

    Args:
        modes: of each operand: "number" (the same everywhere, an argument), "dense" (the elements of a step lie one
            after the other) or "strided".
        dims: of a step, where an operand is strided.
        wide: offsets within a step need 64 bits.
    """

    modes: tuple[str, ...]
    dims: int = 1
    wide: bool = False


@dataclass(eq=False)
class TritonSource:
    """A generated kernel.

    Args:
        slots: its operands, in order.
        literals: numbers that it is passed.
        write: its text for a form.
        uses: what it needs of the library of the device.
    """

    slots: tuple[KernelOperand, ...]
    literals: tuple[float, ...]
    write: Callable[[OperandForm], str]
    uses: frozenset[str]
    texts: dict[OperandForm, str] = field(default_factory=dict)

    def text(self, form: OperandForm) -> str:
        """The kernel in Triton: a function `kernel` of `parameters(form)`."""
        if form not in self.texts:
            self.texts[form] = self.write(form)
        return self.texts[form]

    @property
    def usual(self) -> OperandForm:
        """The form of a step from the reset state whose operands have no gaps."""
        return OperandForm(
            tuple("number" if slot.kind in ("initial", "grad_final") else "dense" for slot in self.slots)
        )

    def parameters(self, form: OperandForm) -> list[str]:
        """The parameters of the kernel, with their annotations: operands, sizes, numbers, elements of a step, T, BLOCK.

        An operand has its number or pointer, then the elements from step to step if it has time, then its strides.
        """
        found: list[str] = []
        for number, (slot, mode) in enumerate(zip(self.slots, form.modes, strict=True)):
            found.append(f'f{number}: "fp64"' if mode == "number" else f"p{number}")
            if mode != "number" and slot.has_time:
                found.append(f'd{number}: "i64"')
            if mode == "strided":
                found += [f"s{number}_{d}" for d in range(form.dims)]
        found += [f"n{d}" for d in range(1, form.dims)]
        found += [f'k{index}: "fp64"' for index in range(len(self.literals))]
        return [*found, "elements", "T", "BLOCK: tl.constexpr"]
