"""Decide whether rounding explains a difference that vanishes in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.inspect.verify.check import Check
from snnfx.inspect.verify.comparison import Comparison, named_leaves
from snnfx.inspect.verify.rounding import NearThresholds
from snnfx.inspect.verify.runs import Run

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
    for kind in {c.kind for c in failing.failed}:
        narrow, exact_values = _values(expected, kind), _values(exact, kind)
        errors = [
            float((torch.as_tensor(value).double() - torch.as_tensor(exact_values[name]).double()).abs().max())
            for name, value in narrow.items()
            if _has_elements(value) and _has_elements(exact_values.get(name))
        ]
        if max(c.difference for c in failing.failed if c.kind == kind) > 30 * max(errors, default=0.0):
            return False
    return True


def _values(run: Run, kind: str) -> dict[str, Any]:
    """The values of one kind that a run leaves, by name."""
    if kind in ("output", "gradient"):
        return run.outputs if kind == "output" else run.gradients
    if kind == "state":
        return named_leaves(run.states)
    return {name: entry.value for name, entry in run.after.items() if entry.kind == kind}


def _has_elements(value: Any) -> bool:
    is_tensor = isinstance(value, Tensor) and value.layout == torch.strided and value.numel() > 0
    return is_tensor or (isinstance(value, float | complex) and value == value)


def describe_rounding(failing: Check) -> str:
    """The spikes that flip, or the largest difference."""
    flips = failing.flips()
    if flips.count and flips.first is not None:
        return f"{flips.count} of {flips.total} spikes flip, first in {flips.first.in_words}"
    worst = max(failing.failed, key=lambda c: c.relative)
    return f"{worst.name} differs by {worst.difference:.2g} (relative {worst.relative:.2g})"
