"""Compare one value of the net with that of the model, and put what was found into words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnfx.sandbox.torch_internals import pytree

__all__ = ["Comparison", "Tolerance", "VerificationReport", "are_spikes", "compare", "is_same", "named_leaves"]

_DEFAULTS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (1e-3, 1e-2),
    torch.bfloat16: (1e-2, 5e-2),
}
_COARSEST = _DEFAULTS[torch.bfloat16]


@dataclass(frozen=True)
class Tolerance:
    """How much values may differ: `atol + rtol * scale`, `scale` being the largest magnitude in the expected tensor.

    Not element by element: summing in another order leaves an error of the size of the summands, not of the sum.

    Args:
        atol: absolute part; None: by dtype.
        rtol: relative part; None: by dtype.
    """

    atol: float | None = None
    rtol: float | None = None

    def allowed(self, dtype: torch.dtype, scale: float) -> float:
        """The largest difference allowed in tensors of this dtype; none where numbers are not floating."""
        if not (dtype.is_floating_point or dtype.is_complex):
            return 0.0
        atol, rtol = _DEFAULTS.get(dtype.to_real() if dtype.is_complex else dtype, _COARSEST)
        return (atol if self.atol is None else self.atol) + (rtol if self.rtol is None else self.rtol) * scale


@dataclass(frozen=True)
class Comparison:
    """One value of the net beside that of the model.

    Args:
        kind: "output", "state", "buffer" or "gradient".
        name: qualified name.
        difference: the largest absolute difference.
        relative: the same, relative to the largest magnitude expected.
        allowed: the largest absolute difference allowed.
        failed: whether they differ by more than that, or in kind.
        detail: how they differ, in words; "" when they do not.
        step: the first time step at which they differ, where values have a time dimension.
    """

    kind: str
    name: str
    difference: float = 0.0
    relative: float = 0.0
    allowed: float = 0.0
    failed: bool = False
    detail: str = ""
    step: int | None = None


def compare(
    kind: str, name: str, actual: Any, expected: Any, tolerance: Tolerance, *, timed: bool = False, floor: float = 0.0
) -> Comparison:
    """Compare two values: tensors, numbers (a number stands for a tensor full of it, in states) or anything with ==.

    Args:
        kind: of the comparison, see `Comparison`.
        name: of the value.
        actual: the net's.
        expected: the model's.
        tolerance: how much they may differ.
        timed: tensors are `[T, *]`, and the first t is of interest.
        floor: least scale for the relative tolerance.
    """
    numbers = (Tensor, int, float, complex)
    if not isinstance(actual, numbers) or not isinstance(expected, numbers):
        equal = type(actual) is type(expected) and bool(actual == expected)
        inf = 0.0 if equal else float("inf")
        detail = "" if equal else f"it is {_in_words(actual)} where that of the model is {_in_words(expected)}"
        return Comparison(kind, name, inf, inf, failed=not equal, detail=detail)
    a, b = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    both_tensors = isinstance(actual, Tensor) and isinstance(expected, Tensor)
    is_scalar = kind == "state" and (a.ndim == 0 or b.ndim == 0)
    if not is_scalar and (a.shape != b.shape or (both_tensors and a.dtype != b.dtype)):
        detail = f"it is {_in_words(a)} where that of the model is {_in_words(b)}"
        return Comparison(kind, name, float("inf"), float("inf"), failed=True, detail=detail)
    dtype = b.dtype if isinstance(expected, Tensor) else a.dtype
    exact_dtype = torch.complex128 if dtype.is_complex else torch.float64
    a, b = torch.broadcast_tensors(a.to(b.device, exact_dtype), b.to(exact_dtype))
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    finite = torch.where(b.isfinite(), b.abs(), 0.0)
    scale = float(finite.max()) if b.numel() else 0.0
    largest = float(difference.max()) if b.numel() else 0.0
    allowed = tolerance.allowed(dtype, max(scale, floor))
    wrong = difference > allowed
    if not bool(wrong.any()):
        return Comparison(kind, name, largest, largest / scale if scale else 0.0, allowed)
    relative = largest / scale if scale else float("inf")
    sizes = f"largest difference {largest:.3g} (relative {relative:.3g}, allowed {allowed:.2g})"
    what = "spikes" if are_spikes(a) and are_spikes(b) and timed else "elements"
    if wrong.numel() == 1:
        detail = f"it is {a.item():.6g} where that of the model is {b.item():.6g}, {sizes}"
        return Comparison(kind, name, largest, relative, allowed, True, detail, 0 if timed else None)
    if not timed:
        detail = f"{int(wrong.sum())} of {wrong.numel()} {what} differ, {sizes}"
        return Comparison(kind, name, largest, relative, allowed, True, detail)
    at_each_step = wrong.flatten(1).sum(1) if wrong.ndim > 1 else wrong.long()
    step = int(at_each_step.nonzero()[0])
    detail = (
        f"first at t = {step}, where {int(at_each_step[step])} of {wrong[step].numel()} {what} differ; over all steps "
    )
    detail += f"{int(wrong.sum())} of {wrong.numel()}, {sizes}"
    return Comparison(kind, name, largest, relative, allowed, True, detail, step)


def are_spikes(x: Tensor) -> bool:
    """Whether a tensor holds nothing but zeros and ones."""
    return bool(((x == 0) | (x == 1)).all())


def named_leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nest of values by their path, as one would write it."""
    return {prefix + pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(value)}


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal bit by bit."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    return value is other or (type(value) is type(other) and bool(value == other))


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value)


@dataclass(frozen=True)
class VerificationReport:
    """What `snnfx.verify` compared, and how much it differs. `str()` is a summary.

    Args:
        T: number of time steps.
        training: the mode of the net.
        dtype: of the parameters.
        semantics: what the net was compared with.
        comparisons: one for each output, state, buffer and gradient.
        notes: what was not compared, or differs in how.
    """

    T: int
    training: bool
    dtype: str
    semantics: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()

    def largest(self, kind: str) -> float:
        """The largest absolute difference in values of a kind: "output", "state", "buffer" or "gradient"."""
        return max((c.difference for c in self.comparisons if c.kind == kind), default=0.0)

    def count(self, kind: str) -> int:
        """How many values of a kind were compared."""
        return sum(c.kind == kind for c in self.comparisons)

    def __str__(self) -> str:
        mode = ", ".join(["training" if self.training else "eval", *([self.dtype] if self.dtype else [])])
        lines = [f"the net does the same over T = {self.T} steps as {self.semantics} ({mode})"]
        for kind in ("output", "state", "buffer", "gradient"):
            if self.count(kind):
                lines.append(f"  {kind + 's':<10}{self.count(kind):>4}   largest difference {self.largest(kind):.2g}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
