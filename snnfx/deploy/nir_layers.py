"""The layers of a recorded step that NIR has a node for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.deploy.nir_forms import Parts
from snnfx.deploy.nir_step import refusal

__all__ = ["Convolution", "Dense", "Flattening", "Layer", "Pooling", "layer_of"]

_aten: Any = torch.ops.aten


@dataclass
class Dense:
    """Affine or Linear: a matrix on vectors."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class Convolution:
    """Conv1d or Conv2d with one group and a kernel that NIR can describe."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    input_size: tuple[int, ...]


@dataclass
class Flattening:
    """Flatten from `start` to `end`, dimensions without the batch."""

    start: int
    end: int
    shape: tuple[int, ...]


@dataclass
class Pooling:
    """AvgPool2d or SumPool2d."""

    is_sum: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


Layer = Dense | Convolution | Flattening | Pooling


def layer_of(node: Node, parts: Parts) -> tuple[Layer, Node]:
    """The layer that a call computes, and the node of its input.

    Raises:
        ExportError: SNNFX813, NIR has no node for it.
    """
    target = node.target
    if target in (_aten.mm.default, _aten.addmm.default):
        return _dense(node, parts)
    if target is _aten.convolution.default:
        return _convolution(node, parts)
    if target in (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default):
        return _flattening(node, parts)
    if target in (_aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default):
        return _flattening(node, parts)
    if target is _aten.avg_pool2d.default:
        return _pooling(node, parts)
    if target in (_aten._adaptive_avg_pool2d.default, _aten.mean.dim):
        return _whole_average(node, parts)
    called = node.args[0].target if isinstance(node.args[0], Node) and "getitem" in str(target) else target
    raise refusal(node, f"NIR has no node for `{str(called).removeprefix('aten.').split('.')[0].strip('_')}`.")


def _constant(node: Any, parts: Parts, what: str, of: Node) -> Tensor:
    if not isinstance(node, Node) or node in parts.varying:
        raise refusal(of, f"its {what} changes over time.")
    return parts.step.values[node].detach()  # type: ignore[no-any-return]


def _dense(node: Node, parts: Parts) -> tuple[Layer, Node]:
    bias: Tensor | None = None
    *rest, x, weight = node.args[:3] if node.target is _aten.addmm.default else node.args[:2]
    assert isinstance(x, Node)
    matrix = _constant(weight, parts, "weight", node)
    if rest:
        bias = _constant(rest[0], parts, "bias", node) * float(node.kwargs.get("beta", 1))  # type: ignore[arg-type]
        matrix = matrix * float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        if bias.dim() > 1 and bias.shape[0] != 1:
            raise refusal(node, "its bias differs between the samples of a batch.")
        bias = (
            bias.reshape(-1, bias.shape[-1])[0].expand(matrix.shape[1]) if bias.dim() else bias.expand(matrix.shape[1])
        )
    parts.step.features(x)
    return Dense(matrix.t(), bias), x


def _convolution(node: Node, parts: Parts) -> tuple[Layer, Node]:
    x, w, b, stride, padding, dilation, transposed, _, groups = node.args
    assert isinstance(x, Node)
    if transposed:
        raise refusal(node, "NIR has no transposed convolution.")
    weight = _constant(w, parts, "weight", node)
    bias = None if b is None else _constant(b, parts, "bias", node)
    size = parts.step.features(x)[1:]
    if len(size) not in (1, 2):
        raise refusal(node, "NIR has convolutions over one and two dimensions only.")
    weight = _one_group(weight, int(groups))  # type: ignore[arg-type]
    spread = [tuple(int(v) for v in p) * (len(size) // len(p)) for p in (stride, padding, dilation)]  # type: ignore[union-attr, arg-type]
    weight, spread[1] = _square(weight, spread[1], spread[2], node)
    return Convolution(weight, bias, spread[0], spread[1], spread[2], size), x


def _one_group(weight: Tensor, groups: int) -> Tensor:
    """The weight of the same convolution with one group: the shape inference of NIR does not know groups."""
    if groups == 1:
        return weight
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], inputs * groups, *weight.shape[2:])
    for group in range(groups):
        rows, columns = slice(group * outputs, (group + 1) * outputs), slice(group * inputs, (group + 1) * inputs)
        full[rows, columns] = weight[rows]
    return full


def _square(
    weight: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...], node: Node
) -> tuple[Tensor, tuple[int, ...]]:
    """A kernel with zeros around it, as high as wide: the shape inference of NIR reads the height only."""
    kernel = tuple(weight.shape[2:])
    missing = [max(kernel) - k for k in kernel]
    if not any(missing):
        return weight, padding
    added = [m * d for m, d in zip(missing, dilation, strict=True)]
    if any(m % 2 for m in missing):
        raise refusal(
            node,
            f"NIR infers its output shape from the height of the kernel only, which is {list(kernel)}.",
            "Use a square kernel, or one whose height and width differ by an even number.",
        )
    around = [side for m in reversed(missing) for side in (m // 2, m // 2)]
    padding = tuple(p + a // 2 for p, a in zip(padding, added, strict=True))
    return torch.nn.functional.pad(weight, around), padding


def _flattening(node: Node, parts: Parts) -> tuple[Layer, Node]:
    x = node.args[0]
    assert isinstance(x, Node)
    before, after = parts.step.features(x), parts.step.features(node)
    for start in range(len(before)):
        for end in range(start, len(before)):
            if (*before[:start], math.prod(before[start : end + 1]), *before[end + 1 :]) == after:
                return Flattening(start, end, before), x
    raise refusal(
        node,
        f"it changes the shape from {list(before)} to {list(after)} (without the batch), but NIR has Flatten only.",
    )


def _pooling(node: Node, parts: Parts) -> tuple[Layer, Node]:
    arguments: list[Any] = [None, None, None, (0, 0), False, True, None]
    arguments[: len(node.args)] = list(node.args)
    x, kernel, stride, padding, ceil, counts_padding, divisor = arguments
    assert isinstance(x, Node) and isinstance(kernel, list | tuple) and isinstance(padding, list | tuple)
    size, pad = _pair(kernel), _pair(padding)
    step = _pair(stride) if isinstance(stride, list | tuple) and stride else size
    if ceil or (any(pad) and not counts_padding) or divisor not in (None, 1, math.prod(size)):
        raise refusal(node, "NIR's pooling has no ceil_mode and no divisor, and counts the padding.")
    is_sum = divisor == 1 and math.prod(size) != 1
    return Pooling(is_sum, size, step, pad), x


def _whole_average(node: Node, parts: Parts) -> tuple[Layer, Node]:
    """An average over windows that divide the image, or over the whole image."""
    x = node.args[0]
    assert isinstance(x, Node)
    before, after = parts.step.features(x), parts.step.features(node)
    if (
        len(before) != 3
        or len(after) != 3
        or after[0] != before[0]
        or any(b % a for b, a in zip(before, after, strict=True))
    ):
        raise refusal(node, "NIR averages over windows of one size that divide the image, and keeps the dimensions.")
    kernel = (before[1] // after[1], before[2] // after[2])
    return Pooling(False, kernel, kernel, (0, 0)), x


def _pair(values: Any) -> tuple[int, int]:
    numbers = [int(v) for v in values]
    return (numbers[0], numbers[-1])
