"""Run a layer densely or by events, by the density of its input.

Region graphs call these functions for the layers that `snnfx.passes.choose_event_layers` marks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from snnfx.lowering.choices.linear_layers import linear
from snnfx.lowering.events.event_gradients import Gradients, differentiable_product
from snnfx.lowering.events.event_kernel import estimate_density, product
from snnfx.lowering.events.few_rows import has_few_rows, product_of_few_rows
from snnfx.lowering.events.few_rows_gradients import choose_gradients
from snnfx.lowering.events.geometry import LINEAR, Geometry
from snnfx.lowering.events.layer_decisions import (
    DENSE,
    LAYERS,
    LEAST_WORK,
    PLAIN,
    crossover_of,
    decision_of,
    forget_decision,
    geometry_of_layer,
    geometry_of_settings,
    gradient_crossover_of,
    has_kernel,
    is_plain_call,
    is_plain_mode,
    is_supported,
    positions_of,
)
from snnfx.lowering.events.packed_weights import packed_weight
from snnfx.ops.folded_weights import call_layer
from snnfx.state.leaf_modules import call_leaf

__all__ = ["FUNCTIONS", "call_layer_by_events", "call_normed_layer_by_events"]

_LEAST_TRAINED_POSITIONS = 1024
"""Output pixels from which on packing the weight at each step of an optimizer costs little, in training."""


def call_layer_by_events(layer: Any, x: Any) -> Any:
    """Call a layer, densely or by events."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or _is_small(x, layer.weight):
        return call_leaf(layer, x)
    if not is_plain_call(layer):
        forget_decision(layer.weight)
        return call_leaf(layer, x)
    y = _with_weight(layer, x, layer.weight, layer.bias, layer.weight)
    if y is None and type(layer) is nn.Linear and is_plain_mode():
        return linear(x, layer.weight, layer.bias)
    return call_leaf(layer, x) if y is None else y


def call_normed_layer_by_events(layer: Any, norm: Any, x: Any) -> tuple[Any, bool]:
    """`snnfx.ops.folded_weights.call_layer`, densely or by events."""

    def with_folded(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        return _with_weight(layer, x, weight, bias, layer.weight)

    return call_layer(layer, norm, x, call_layer_by_events, with_folded)


def linear_by_events(*args: Any, **kwargs: Any) -> Any:
    """`torch.nn.functional.linear`, densely or by events."""
    return _call_function(functional.linear, args, kwargs)


def conv1d_by_events(*args: Any, **kwargs: Any) -> Any:
    """`torch.nn.functional.conv1d`, densely or by events."""
    return _call_function(functional.conv1d, args, kwargs)


def conv2d_by_events(*args: Any, **kwargs: Any) -> Any:
    """`torch.nn.functional.conv2d`, densely or by events."""
    return _call_function(functional.conv2d, args, kwargs)


def conv3d_by_events(*args: Any, **kwargs: Any) -> Any:
    """`torch.nn.functional.conv3d`, densely or by events."""
    return _call_function(functional.conv3d, args, kwargs)


FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: linear_by_events,
    functional.conv1d: conv1d_by_events,
    functional.conv2d: conv2d_by_events,
    functional.conv3d: conv3d_by_events,
}
"""Function -> the same function, densely or by events."""


def _call_function(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.compiler.is_compiling():
        x, weight, bias, *settings = _operands(function, args, kwargs)
        if type(x) is Tensor and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN):
            geometry = LINEAR if function is functional.linear else geometry_of_settings(weight, *settings)
            y = _product(function, x, weight, bias, geometry, weight)
            if y is not None:
                return y
    return function(*args, **kwargs)


def _operands(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    values = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    values.update(zip(names, args, strict=False))
    values.update(kwargs)
    return [values.get(name) for name in (names[:3] if function is functional.linear else names)]


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether a call surely has too little work: at most one multiplication of each input by output and tap."""
    return weight.dim() < 2 or x.numel() * weight.numel() < LEAST_WORK * weight.shape[1]


def _with_weight(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor) -> Tensor | None:
    if _is_small(x, weight):
        return None
    function = LAYERS.get(type(layer))
    if function is None:
        return None
    return _product(function, x, weight, bias, geometry_of_layer(layer, weight), owner)


def _product(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry | None,
    owner: Tensor,
) -> Tensor | None:
    """The product by events; None if it has to run densely."""
    if (
        geometry is None
        or not x.is_cpu
        or x.layout is not torch.strided
        or not is_plain_mode()
        or not is_supported(x.shape, x.dtype, weight, bias, geometry)
    ):
        forget_decision(owner)
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    outputs, groups = weight.shape[0], geometry.groups
    positions = positions_of(x.shape, geometry)
    work = positions * weight.numel()
    reads_in_place = geometry.dims == 0 and has_few_rows(positions, weight, differentiates)
    may_pack = not differentiates or positions >= _LEAST_TRAINED_POSITIONS
    if work < LEAST_WORK:
        return None
    if not (may_pack or reads_in_place) or not has_kernel(x.element_size()):
        forget_decision(owner)
        return None
    if not torch.ops.aten.is_non_overlapping_and_dense(x):
        x = x.contiguous()
    density = estimate_density(x.detach())
    if density > DENSE:
        decision_of(owner).update(False, density, None)
        return None
    packed_bias = None if bias is None else bias.detach().contiguous()

    def events(x: Tensor) -> Tensor | None:
        if reads_in_place:
            return product_of_few_rows(x, weight, packed_bias)
        return product(x, geometry, outputs, packed_weight(weight, groups).tiles, packed_bias)

    def dense(x: Tensor) -> Tensor:
        if geometry.dims == 0:
            return linear(x, weight, bias)
        keep = 3 - geometry.dims
        return function(
            x, weight, bias, geometry.stride[keep:], geometry.padding[keep:], geometry.dilation[keep:], groups
        )

    limit = crossover_of(x.detach(), weight, geometry, work, reads_in_place, dense, events)
    if density >= limit:
        decision_of(owner).update(False, density, limit)
        return None
    if reads_in_place:
        y = _in_place(x, weight, bias, packed_bias, differentiates)
        decision_of(owner).update(y is not None, density, limit, y is not None)
        return y
    packed = packed_weight(weight, groups)  # checks the content: once a call
    decision_of(owner).update(packed.is_finite, density, limit, packed.is_finite)
    if not packed.is_finite:
        return None
    if not differentiates:
        return product(x, geometry, outputs, packed.tiles, packed_bias)
    gradients = Gradients.DENSE
    if weight.requires_grad and density < gradient_crossover_of(x, weight, geometry, work):
        gradients = Gradients.WEIGHT_BY_EVENTS

    def compute(x: Tensor) -> Tensor:
        return product(x, geometry, outputs, packed.tiles, packed_bias)

    return differentiable_product(compute, x, weight, bias, geometry, gradients)


def _in_place(
    x: Tensor, weight: Tensor, bias: Tensor | None, packed_bias: Tensor | None, differentiates: bool
) -> Tensor | None:
    """The product of few rows with a weight that is not packed; None if the weight is not finite."""
    if not differentiates:
        return product_of_few_rows(x, weight, packed_bias)
    y = product_of_few_rows(x.detach(), weight.detach(), packed_bias)
    if y is None:
        return None
    gradients = Gradients.FEW_ROWS if choose_gradients(x, weight) else Gradients.DENSE
    return differentiable_product(lambda _: y, x, weight, bias, LINEAR, gradients)
