"""The memory format in which a small convolution is fastest.

A large convolution is fastest in channels-last format, or row-major if it has more weights than its images have
elements. For a small one it depends on the kernels that torch chooses for its sizes, so both formats are timed once, on
tensors of the same sizes, with the conversions that they need. Values do not depend on the format, except for the
rounding of another kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from snnfx.lowering.choices.fastest import Choice, Fastest
from snnfx.ops.memory_format import may_be_reformatted, row_major, to_channels_last

__all__ = ["FORMATS", "Convolution", "fastest_format", "forget_choices", "latest_choice"]

Convolution = tuple[tuple[int, ...], tuple[int, ...], Any, tuple[int, ...], int, bool]
"""Shape of the weight, stride, padding, dilation and groups of a 2-d convolution; whether its users read row-major."""

FORMATS = Fastest("image_formats", ("channels-last", "row-major"))

_MOST_WORK = 1 << 23
"""Multiplications up to which the format is measured: a millisecond, about."""

_decided: dict[tuple[object, ...], Choice] = {}
"""Choices by all that they depend on: looking one up takes less time than deciding again."""

_MOST_DECIDED = 4096

_latest: dict[tuple[object, ...], Choice] = {}
"""By the settings of the convolution, without its users."""


def fastest_format(x: Tensor, weights: int, convolution: Convolution) -> Tensor:
    """Convert images to the memory format in which a convolution is fastest.

    Args:
        x: images `[N, C, H, W]`; everything else is returned unchanged.
        weights: the number of image elements below which the fixed choice is row-major.
        convolution: the convolution.
    """
    if not may_be_reformatted(x):
        return x
    is_row_major = x.is_contiguous()
    choice = _choose(x, is_row_major, weights, convolution)
    _latest[convolution[:5]] = choice
    if choice.name == "row-major":
        return x if is_row_major else row_major(x)
    return to_channels_last(x)


def latest_choice(settings: tuple[object, ...]) -> Choice | None:
    """The choice of the latest call of a convolution with these settings: a `Convolution` without its last element."""
    return _latest.get(settings)


def forget_choices() -> None:
    """Forget the choices of this process; the measurements on disk stay."""
    FORMATS.remembered.forget()
    _decided.clear()
    _latest.clear()


def _choose(x: Tensor, is_row_major: bool, weights: int, convolution: Convolution) -> Choice:
    shape, dtype, differentiates = x.shape, x.dtype, torch.is_grad_enabled()
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")
    key = convolution, weights, shape, dtype, is_row_major, differentiates, settings
    found = _decided.get(key)
    if found is None:
        found = _decide(x, is_row_major, weights, convolution)
        if len(_decided) >= _MOST_DECIDED:
            _decided.clear()
        if found.is_final:
            _decided[key] = found
    return found


def _decide(x: Tensor, is_row_major: bool, weights: int, convolution: Convolution) -> Choice:
    fixed = "row-major" if x.numel() < weights else "channels-last"
    shape, differentiates = x.shape, torch.is_grad_enabled()
    work = x.numel() // max(x.shape[1], 1) * math.prod(convolution[0]) // math.prod(convolution[1])
    if work > _MOST_WORK:
        return Choice(fixed, "fixed for its size")
    if not x.numel() or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return Choice(fixed, "fixed for its dtype")
    key = (convolution, shape[0].bit_length(), *shape[1:], is_row_major, differentiates)
    return FORMATS.choose(key, fixed, lambda: _calls(shape, is_row_major, differentiates, convolution))


def _calls(
    shape: torch.Size, is_row_major: bool, differentiates: bool, convolution: Convolution
) -> dict[str, Callable[[], object]]:
    """A call of the convolution in each format, with its gradients if `differentiates`, on tensors of ones."""
    weight_shape, stride, padding, dilation, groups, is_read_row_major = convolution
    weight = torch.ones(weight_shape, device="cpu", dtype=torch.float32, requires_grad=differentiates)
    x = torch.ones(shape, device="cpu", dtype=torch.float32)
    x = (x if is_row_major else to_channels_last(x)).requires_grad_(differentiates)

    def call(convert: Callable[[Tensor], Tensor]) -> object:
        y = functional.conv2d(convert(x), weight, None, stride, padding, dilation, groups)
        y = row_major(y) if is_read_row_major else y
        return torch.autograd.grad(y, (x, weight), torch.ones_like(y)) if differentiates else y

    return {"channels-last": lambda: call(to_channels_last), "row-major": lambda: call(row_major)}
