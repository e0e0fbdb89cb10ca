"""Decide whether rounding explains a difference that vanishes in float64."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from snnfx.inspect.verify.check import Check
from snnfx.inspect.verify.comparison import Comparison
from snnfx.inspect.verify.rounding import NearThresholds

__all__ = ["describe_rounding", "is_rounding", "is_structural"]


def is_structural(comparison: Comparison) -> bool:
    """Whether a difference is one of shape, type or presence, which rounding does not cause."""
    return comparison.difference == float("inf") or not comparison.allowed


def is_rounding(failing: Check, wide: Sequence[Check]) -> bool:
    """Whether rounding explains the differences of a net that agrees with its reference in float64.

    It does if the model compares numbers that are as close as rounding errors, or if its results in the narrower
    dtype are as far from those in float64 as the results of the net are.

    Args:
        failing: the check in the narrower dtype.
        wide: the checks in float64, without a difference.
    """
    near = NearThresholds(failing.tolerance)
    with near:
        failing.runs.run_model()
    if near.count:
        return True
    expected = failing.expected
    exact = next(check for check in wide if check.runs.one_call == failing.runs.one_call).expected
    assert expected is not None and exact is not None
    for kind, narrow, exact_values in (
        ("output", expected.outputs, exact.outputs),
        ("gradient", expected.gradients, exact.gradients),
    ):
        errors = [
            float((value.double() - exact_value.double()).abs().max())
            for value, exact_value in ((value, exact_values.get(name)) for name, value in narrow.items())
            if isinstance(value, Tensor) and isinstance(exact_value, Tensor) and value.numel()
        ]
        differences = [c.difference for c in failing.failed if c.kind == kind]
        if differences and max(differences) > 30 * max(errors, default=0.0):
            return False
    return all(c.kind in ("output", "gradient") for c in failing.failed)


def describe_rounding(failing: Check) -> str:
    """The spikes that flip, or the largest difference."""
    flips = failing.flips()
    if flips.count and flips.first is not None:
        return f"{flips.count} of {flips.total} spikes flip, first in {flips.first.in_words}"
    worst = max(failing.failed, key=lambda c: c.relative)
    return f"{worst.name} differs by {worst.difference:.2g} (relative {worst.relative:.2g})"
