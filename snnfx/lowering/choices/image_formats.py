"""The memory format in which a small convolution is fastest, and whether it takes its images one by one.

A large convolution is fastest in channels-last format, or row-major if it has more weights than its images have
elements. For a small one it depends on the kernels that torch chooses for its sizes, so both formats are timed once, on
tensors of the same sizes, with the conversions that they need. Values do not depend on the format, except for the
rounding of another kernel.

PyTorch computes a single small image by a kernel of its own, which starts much faster than oneDNN. Folding time makes
two images of it. So few small images are also timed one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from snnfx.lowering.choices.fastest import Choice, Fastest
from snnfx.ops.memory_format import may_be_reformatted, row_major, to_channels_last

__all__ = ["FORMATS", "Convolution", "convolve", "fastest_format", "forget_choices", "latest_choice"]

Convolution = tuple[tuple[int, ...], tuple[int, ...], Any, tuple[int, ...], int, bool]
"""Shape of the weight, stride, padding, dilation and groups of a 2-d convolution; whether its users read row-major."""

FORMATS = Fastest("image_formats", ("channels-last", "row-major", "one by one"))

_MOST_IMAGES = 8
"""Images up to which they are timed one by one."""

_MOST_WORK = 1 << 23
"""Multiplications up to which the format is measured: a millisecond, about."""

_decided: dict[tuple[object, ...], Choice] = {}
"""Choices by all that they depend on: looking one up takes less time than deciding again."""

_MOST_DECIDED = 4096

_latest: dict[tuple[object, ...], Choice] = {}
"""By the settings of the convolution, without its users."""


def fastest_format(x: Tensor, weights: int, convolution: Convolution, is_split: bool = False) -> Tensor:
    """Convert images to the memory format in which a convolution is fastest.

    Args:
        x: images `[N, C, H, W]`; everything else is returned unchanged.
        weights: the number of image elements below which the fixed choice is row-major.
        convolution: the convolution.
        is_split: whether `convolve` calls the convolution.
    """
    if not may_be_reformatted(x):
        return x
    is_row_major = x.is_contiguous()
    choice = _choose(x, is_row_major, weights, convolution, is_split and 1 < x.shape[0] <= _MOST_IMAGES)
    _latest[convolution[:5]] = choice
    if choice.name != "channels-last":
        return x if is_row_major else row_major(x)
    return to_channels_last(x)


def convolve(layer: nn.Module, x: Tensor, convolution: Convolution) -> Tensor:
    """Call a convolution, image by image if that was measured to be fastest.

    Args:
        layer: a plain 2-d convolution.
        x: images that `fastest_format` has just returned, called with `is_split`.
        convolution: the convolution.
    """
    choice = _latest.get(convolution[:5]) if x.dim() == 4 and 1 < x.shape[0] <= _MOST_IMAGES else None
    if choice is not None and choice.name == "one by one":
        return torch.cat([layer.forward(image) for image in x.split(1)])
    return layer.forward(x)  # type: ignore[no-any-return]


def latest_choice(settings: tuple[object, ...]) -> Choice | None:
    """The choice of the latest call of a convolution with these settings: a `Convolution` without its last element."""
    return _latest.get(settings)


def forget_choices() -> None:
    """Forget the choices of this process; the measurements on disk stay."""
    FORMATS.remembered.forget()
    _decided.clear()
    _latest.clear()


def _choose(x: Tensor, is_row_major: bool, weights: int, convolution: Convolution, is_split: bool) -> Choice:
    shape, dtype, differentiates = x.shape, x.dtype, torch.is_grad_enabled()
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu")
    key = convolution, weights, shape, dtype, is_row_major, is_split, differentiates, settings
    found = _decided.get(key)
    if found is None:
        found = _decide(x, is_row_major, weights, convolution, is_split)
        if len(_decided) >= _MOST_DECIDED:
            _decided.clear()
        if found.is_final:
            _decided[key] = found
    return found


def _decide(x: Tensor, is_row_major: bool, weights: int, convolution: Convolution, is_split: bool) -> Choice:
    fixed = "row-major" if x.numel() < weights else "channels-last"
    shape, differentiates = x.shape, torch.is_grad_enabled()
    work = x.numel() // max(x.shape[1], 1) * math.prod(convolution[0]) // math.prod(convolution[1])
    if work > _MOST_WORK:
        return Choice(fixed, "fixed for its size")
    if not x.numel() or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return Choice(fixed, "fixed for its dtype")
    count = f"{shape[0]} images" if is_split else shape[0].bit_length()
    key = (convolution, count, *shape[1:], is_row_major, differentiates)
    return FORMATS.choose(key, fixed, lambda: _calls(shape, is_row_major, differentiates, convolution, is_split))


def _calls(
    shape: torch.Size, is_row_major: bool, differentiates: bool, convolution: Convolution, is_split: bool
) -> dict[str, Callable[[], object]]:
    """A call of the convolution in each format, with its gradients if `differentiates`, on tensors of ones."""
    weight_shape, stride, padding, dilation, groups, is_read_row_major = convolution
    weight = torch.ones(weight_shape, device="cpu", dtype=torch.float32, requires_grad=differentiates)
    x = torch.ones(shape, device="cpu", dtype=torch.float32)
    x = (x if is_row_major else to_channels_last(x)).requires_grad_(differentiates)

    def convolution_of(images: Tensor) -> Tensor:
        return functional.conv2d(images, weight, None, stride, padding, dilation, groups)

    def call(convert: Callable[[Tensor], Tensor], convolve: Callable[[Tensor], Tensor] = convolution_of) -> object:
        y = convolve(convert(x))
        y = row_major(y) if is_read_row_major else y
        return torch.autograd.grad(y, (x, weight), torch.ones_like(y)) if differentiates else y

    ways = {"channels-last": lambda: call(to_channels_last), "row-major": lambda: call(row_major)}
    if is_split:
        ways["one by one"] = lambda: call(row_major, lambda v: torch.cat([convolution_of(i) for i in v.split(1)]))
    return ways
