"""Recorded convolutions with a constant weight, forward and backward, as convolutions of an extended input.

The input gradient of a convolution and a transposed convolution are convolutions too: of the input with zeros between
its elements, with the kernel reversed (Dumoulin & Visin, "A guide to convolution arithmetic for deep learning").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from snnfx.lowering.aten_recording import AtenCall, RecordedValue, ValueReference

__all__ = ["ConvolutionCall", "Settings", "Sizes", "convolution_with_constant"]

Sizes = tuple[int, int, int]

_LARGEST_WORK = 1 << 25
"""Multiplications of a sample up to which the compiled loop was measured to be faster than a call of PyTorch."""

_LARGEST_WEIGHT = 1 << 16
"""Elements of a weight up to which the compiled loop is faster: it packs the weight and reads it for each sample."""

_COST_OF_CALL = 1 << 22
"""Multiplications of a thread that take as long as a call of PyTorch that shares its work among threads."""


@dataclass(frozen=True)
class Settings:
    """The settings of a convolution of an extended input, with leading dimensions of size 1 up to three dimensions.

    Args:
        dims: the number of spatial dimensions.
        kernel, stride, dilation: by dimension.
        spacing: the distance of neighbouring elements of the input in the extended input; zeros lie between them.
        padding: the position of the first element of the input in the extended input; may be negative.
        groups: groups of channels.
        is_reversed: whether the kernel is reversed.
        is_swapped: whether dim 0 of the weight has the channels of the input.
    """

    dims: int
    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    spacing: Sizes
    padding: Sizes
    groups: int
    is_reversed: bool
    is_swapped: bool


@dataclass(frozen=True)
class ConvolutionCall:
    """A recorded call as a convolution.

    Args:
        input, weight, bias: the values that it reads.
        settings: the settings.
    """

    input: int
    weight: int
    bias: int | None
    settings: Settings


def convolution_with_constant(
    call: AtenCall, wanted: Sequence[int], values: Sequence[RecordedValue]
) -> ConvolutionCall | None:
    """The convolution that computes the wanted results of a call; None if the compiled loop leaves it to PyTorch.

    Args:
        call: the call.
        wanted: its results that are read.
        values: the values of the recording.
    """
    if call.kwargs or len(wanted) != 1:
        return None
    if call.name == "convolution":
        found = _forward(call, values)
    elif call.name == "convolution_backward" and call.positions[call.results.index(wanted[0])] == 0:
        found = _input_gradient(call, values)
    else:
        return None
    if found is None or not values[found.input].varying:
        return None
    if any(values[n].varying for n in (found.weight, found.bias) if n is not None):
        return None
    shapes = [values[n].shape for n in (found.input, found.weight, wanted[0])]
    if any(len(shape) != found.settings.dims + 2 or 0 in shape[1:] for shape in shapes) or 0 in shapes[1]:
        return None
    if len({values[n].dtype for n in (found.input, found.weight, wanted[0])}) != 1:
        return None
    work = math.prod(shapes[2][1:]) * shapes[0][1] // found.settings.groups * math.prod(found.settings.kernel)
    return found if _is_faster_in_loop(work, math.prod(shapes[1]), shapes[0][0]) else None


def _is_faster_in_loop(work: int, weight: int, samples: int) -> bool:
    """Whether a loop that divides samples among threads is faster than PyTorch, which divides each convolution.

    Args:
        work: multiplications of a sample.
        weight: elements of the weight.
        samples: the number of samples.
    """
    if work > _LARGEST_WORK or weight > _LARGEST_WEIGHT:
        return False
    threads = torch.get_num_threads()
    return work * -(-samples // threads) - work * samples / threads <= _COST_OF_CALL


def _forward(call: AtenCall, values: Sequence[RecordedValue]) -> ConvolutionCall | None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args
    number = None if bias is None else bias.number
    settings = _settings(values[weight.number].shape, stride, padding, dilation, groups, transposed, transposed)
    return None if settings is None else ConvolutionCall(x.number, weight.number, number, settings)


def _input_gradient(call: AtenCall, values: Sequence[RecordedValue]) -> ConvolutionCall | None:
    grad, _, weight, _, stride, padding, dilation, transposed, _, groups, _ = call.args
    if not isinstance(weight, ValueReference):
        return None
    settings = _settings(values[weight.number].shape, stride, padding, dilation, groups, not transposed, not transposed)
    return None if settings is None else ConvolutionCall(grad.number, weight.number, None, settings)


def _settings(
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    is_transposed: bool,
    is_swapped: bool,
) -> Settings | None:
    dims = len(weight) - 2
    if dims not in (1, 2, 3):
        return None
    kernel, steps = _sizes(weight[2:], dims, 1), _sizes(stride, dims, 1)
    margin, spread = _sizes(padding, dims, 0), _sizes(dilation, dims, 1)
    one: Sizes = (1, 1, 1)
    if not is_transposed:
        return Settings(dims, kernel, steps, spread, one, margin, groups, False, is_swapped)
    d, h, w = (s * (k - 1) - p for k, s, p in zip(kernel, spread, margin, strict=True))
    return Settings(dims, kernel, one, spread, steps, (d, h, w), groups, True, is_swapped)


def _sizes(sizes: Sequence[int], dims: int, filler: int) -> Sizes:
    given = tuple(sizes) * (dims if len(sizes) == 1 else 1)
    d, h, w = (filler,) * (3 - dims) + given
    return d, h, w
