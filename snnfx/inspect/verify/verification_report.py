"""The report of `snnfx.verify`."""

from __future__ import annotations

from dataclasses import dataclass

from snnfx.inspect.verify.comparison import Comparison

__all__ = ["VerificationReport"]

KINDS = ("output", "state", "buffer", "parameter", "attribute", "gradient")


@dataclass(frozen=True)
class VerificationReport:
    """Result of `snnfx.verify`; `str()` is a summary.

    Args:
        T: number of time steps.
        training: mode of the net.
        dtype: dtype in which net and reference were compared.
        semantics: the reference, "the model run step by step" or "BatchNorm statistics over T*N".
        comparisons: one for each output, state, buffer, gradient, and each parameter and attribute that the steps
            change.
        notes: how the comparison was made, values that were not compared, and other remarks; warnings, which come
            first, begin with "warning: ".
        flipped_spikes: spikes that rounding flips in the dtype of the model; 0 if it was not compared.
    """

    T: int
    training: bool
    dtype: str
    semantics: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()
    flipped_spikes: int = 0

    def largest(self, kind: str) -> float:
        """The largest absolute difference in values of a kind, e.g. "output" or "gradient"."""
        return max((c.difference for c in self.comparisons if c.kind == kind), default=0.0)

    def count(self, kind: str) -> int:
        """The number of compared values of a kind."""
        return sum(c.kind == kind for c in self.comparisons)

    def __str__(self) -> str:
        mode = ", ".join(["training" if self.training else "eval", *([self.dtype] if self.dtype else [])])
        steps = f"{self.T} step" + ("s" if self.T != 1 else "")
        lines = [note for note in self.notes if note.startswith("warning: ")]
        lines.append(f"OK: the net matches the reference over T = {steps} ({self.semantics}; {mode})")
        for kind in KINDS:
            if self.count(kind):
                lines.append(f"  {kind + 's':<10}{self.count(kind):>4}   largest difference {self.largest(kind):.2g}")
        lines += [f"  note: {note}" for note in self.notes if not note.startswith("warning: ")]
        return "\n".join(lines)
