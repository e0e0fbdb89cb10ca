"""Compute in float64 the constants that capture computed in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snnfx.emit.emitted_graphs import CONSTANTS
from snnfx.errors import SnnfxError
from snnfx.inspect.verify.observed_contents import is_same

__all__ = ["refine_constants"]


def refine_constants(net: Any, copied: Any, capture: Callable[[], Any]) -> str:
    """Replace rounded constants in the copy of a net, and return a note; "" without a rounded constant.

    The reference computes `torch.linspace(0, 1, 6)` in float64, and a copy of the net has the rounded values. A
    constant that the net itself has in float64 is not replaced: rounding it is a fault of the net.

    Args:
        net: the net.
        copied: its copy in float64.
        capture: converts the model in float64.
    """
    holder = getattr(copied, CONSTANTS, None)
    of_net = getattr(getattr(net, "program", None), "constants", None) or {}
    narrow = {name for name, c in of_net.items() if isinstance(c, Tensor) and _is_narrow(c.dtype)}
    if holder is None or not narrow:
        return ""
    try:
        exact = capture().program.constants
    except SnnfxError as error:
        return (
            f"constants of the net keep their rounding, because the model cannot be captured in float64 ({error.what})"
        )
    refined = 0
    for name in narrow & exact.keys():
        own, value = holder._buffers.get(name), exact[name]
        if _is_rounded(own, value) and not is_same(own, value):
            copied.program.constants[name] = holder._buffers[name] = value.detach().clone()
            refined += 1
    return f"constants of the net were computed anew in float64: {refined}" if refined else ""


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != torch.float64


def _is_rounded(value: Tensor | None, exact: Any) -> bool:
    """Whether a tensor is another one but for rounding to float32."""
    if value is None or not isinstance(exact, Tensor) or exact.dtype != torch.float64 or value.shape != exact.shape:
        return False
    difference, scale = (value.double() - exact).abs(), exact.abs()
    return (
        bool((difference[exact.isfinite()] <= 1e-6 * scale[exact.isfinite()].max()).all()) if value.numel() else False
    )
