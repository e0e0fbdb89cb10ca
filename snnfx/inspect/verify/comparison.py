"""Compare values of the net and the reference, and report their differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnfx.sandbox.torch_internals import pytree

__all__ = ["Comparison", "Tolerance", "are_spikes", "compare", "named_leaves"]

_DEFAULTS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (1e-3, 1e-2),
    torch.bfloat16: (1e-2, 5e-2),
}
_COARSEST = _DEFAULTS[torch.bfloat16]


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed difference: `atol + rtol * scale`, with the largest magnitude of the expected tensor as scale.

    The scale is one for the whole tensor because a changed order of summation leaves an error of the size of the
    summands, not of the sum.

    Args:
        atol: absolute tolerance; None: a default for the dtype.
        rtol: relative tolerance; None: a default for the dtype.
    """

    atol: float | None = None
    rtol: float | None = None

    def allowed(self, dtype: torch.dtype, scale: float) -> float:
        """The largest allowed difference for tensors of a dtype; 0 for integers and booleans."""
        if not (dtype.is_floating_point or dtype.is_complex):
            return 0.0
        atol, rtol = _DEFAULTS.get(dtype.to_real() if dtype.is_complex else dtype, _COARSEST)
        return (atol if self.atol is None else self.atol) + (rtol if self.rtol is None else self.rtol) * scale


@dataclass(frozen=True)
class Comparison:
    """Comparison of one value of the net with the reference.

    Args:
        kind: "output", "state", "buffer", "parameter", "attribute" or "gradient".
        name: qualified name.
        difference: largest absolute difference.
        relative: largest difference relative to the largest magnitude of the reference.
        allowed: largest allowed absolute difference.
        failed: True if the difference is larger, or if the values differ in type, shape or dtype.
        detail: description of the difference; "" without one.
        step: first time step that differs, for values with a time dimension.
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
    """Compare two values: tensors, numbers, or other objects with ==.

    In states, a number stands for a tensor filled with it. A net has states in their final shape from the first step
    on, so a state of the reference may be smaller, like the first state `[1, C]` after one step of a delay by two.

    Args:
        kind: kind of value, see `Comparison`.
        name: name of the value.
        actual: value of the net.
        expected: value of the reference.
        tolerance: largest allowed difference.
        timed: True for tensors `[T, *]`; the first time step that differs is reported then.
        floor: lower bound of the scale of the relative tolerance.
    """
    numbers = (Tensor, int, float, complex)
    if not isinstance(actual, numbers) or not isinstance(expected, numbers):
        equal = type(actual) is type(expected) and bool(actual == expected)
        inf = 0.0 if equal else float("inf")
        detail = "" if equal else _both(_describe(actual), _describe(expected))
        return Comparison(kind, name, inf, inf, failed=not equal, detail=detail)
    a, b = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    if a.layout != b.layout:
        detail = _both(_describe_layout(a), _describe_layout(b))
        return Comparison(kind, name, float("inf"), float("inf"), failed=True, detail=detail)
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    both_tensors = isinstance(actual, Tensor) and isinstance(expected, Tensor)
    is_small = kind == "state" and (a.ndim == 0 or _expands(b.shape, a.shape))
    if not is_small and (a.shape != b.shape or (both_tensors and a.dtype != b.dtype)):
        detail = _both(_describe(a), _describe(b))
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
    noun = "spikes" if are_spikes(a) and are_spikes(b) and timed else "elements"
    if wrong.numel() == 1:
        detail = f"{_both(f'{a.item():.6g}', f'{b.item():.6g}')}, {sizes}"
        return Comparison(kind, name, largest, relative, allowed, True, detail, 0 if timed else None)
    if not timed:
        detail = f"{int(wrong.sum())} of {wrong.numel()} {noun} differ, {sizes}"
        return Comparison(kind, name, largest, relative, allowed, True, detail)
    at_each_step = wrong.flatten(1).sum(1) if wrong.ndim > 1 else wrong.long()
    step = int(at_each_step.nonzero()[0])
    detail = (
        f"first at t = {step}, where {int(at_each_step[step])} of {wrong[step].numel()} {noun} differ; over all steps "
    )
    detail += f"{int(wrong.sum())} of {wrong.numel()} differ, {sizes}"
    return Comparison(kind, name, largest, relative, allowed, True, detail, step)


def _expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of a shape can be expanded to another shape."""
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, other) for size, other in sizes)


def are_spikes(x: Tensor) -> bool:
    """Whether all elements of a tensor are zeros and ones."""
    return bool(((x == 0) | (x == 1)).all())


def named_leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a pytree by their path in Python notation, e.g. "output['rest'][0]"."""
    return {prefix + pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(value)}


def _both(actual: str, expected: str) -> str:
    return f"the net gives {actual}, the reference {expected}"


def _describe_layout(value: Tensor) -> str:
    return f"{_describe(value)} {str(value.layout).removeprefix('torch.')}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value)
