"""Run a layer densely or by events, by the density of its input.

Region graphs call these functions for the layers that `snnfx.passes.choose_event_layers` marks. A layer runs densely
under torch.compile, torch.export, torch.func, forward-mode AD, dispatch modes, hooks, autocast or tracing; for dtypes
other than float32 and float64; on devices other than the CPU; if its weight is not finite; or if its work is so small
that the decision would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from snnfx.errors import warn_once
from snnfx.lowering.aten_recording import LoweringRefused
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.events.crossovers import crossover
from snnfx.lowering.events.event_gradients import differentiable_product
from snnfx.lowering.events.event_kernel import build, estimate_density, fits_lists, product
from snnfx.lowering.events.geometry import LINEAR, Geometry, convolution
from snnfx.lowering.events.packed_weights import packed_weight
from snnfx.ops.folded_weights import call_layer
from snnfx.sandbox.torch_internals import (
    are_transforms_active,
    dispatch_mode_count,
    forward_mode_level,
    has_global_hooks,
    tracing_state,
)
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.leaf_modules import call_leaf

__all__ = [
    "FUNCTIONS",
    "LAYERS",
    "Decision",
    "call_layer_by_events",
    "call_normed_layer_by_events",
    "latest_decision",
]

LAYERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: functional.linear,
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
"""Layer class -> its function. Subclasses are excluded."""

_LEAST_WORK = 1 << 24
"""Multiplications from which on the decision costs little: a few microseconds."""

_LEAST_TRAINED_POSITIONS = 1024
"""Output pixels from which on packing the weight at each step of an optimizer costs little, in training."""

_GRADIENT_PART = 0.75
"""The crossover of the gradient of the weight, as a part of that of the forward pass."""

_LEAST_OUTPUTS = 8
"""Outputs of a group: with fewer, most lanes of a vector would be idle."""

_CALIBRATION_WORK = 1 << 29
"""Multiplications of one dense call of a calibration, about."""

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True)
class Decision:
    """How the latest call of a layer ran.

    Args:
        by_events: whether it visited only the inputs that are not zero.
        density: the estimated fraction of inputs that are not zero.
        crossover: the density below which the layer runs by events.
    """

    by_events: bool
    density: float
    crossover: float


_decisions: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By the layer's weight."""


def latest_decision(weight: Tensor) -> Decision | None:
    """How the latest call with a weight ran; None if there was none, or it was too small for a decision."""
    return _decisions.get(weight)  # type: ignore[no-any-return]


def call_layer_by_events(layer: Any, x: Any) -> Any:
    """Call a layer, densely or by events."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not _is_plain_call(layer):
        return call_leaf(layer, x)
    y = _with_weight(layer, x, layer.weight, layer.bias, layer.weight)
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
        if type(x) is Tensor and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN):
            geometry = LINEAR if function is functional.linear else _geometry(weight, *settings)
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


def _is_plain_call(layer: Any) -> bool:
    """Whether a call of a layer is its function on its weight and bias."""
    return (
        "forward" not in layer.__dict__
        and not has_forward_hooks(layer)
        and not has_global_hooks()
        and type(layer.weight) in _PLAIN
        and (layer.bias is None or type(layer.bias) in _PLAIN)
        and getattr(layer, "padding_mode", "zeros") == "zeros"
    )


def _with_weight(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor) -> Tensor | None:
    function = LAYERS.get(type(layer))
    if function is None:
        return None
    settings = () if function is functional.linear else (layer.stride, layer.padding, layer.dilation, layer.groups)
    geometry = _geometry(weight, *settings) if settings else LINEAR
    return _product(function, x, weight, bias, geometry, owner)


_geometries: dict[tuple[object, ...], Geometry | None] = {}


def _geometry(weight: Tensor, *settings: Any) -> Geometry | None:
    """A cached `convolution(weight, *settings)`."""
    stride, padding, dilation = (tuple(s) if isinstance(s, list) else s for s in settings[:3])
    groups: int = settings[3]
    key = weight.shape, stride, padding, dilation, groups
    if key not in _geometries:
        _geometries[key] = convolution(weight, stride, padding, dilation, groups)
    return _geometries[key]


def _product(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry | None,
    owner: Tensor,
) -> Tensor | None:
    """The product by events; None if it has to run densely."""
    if geometry is None or not _is_supported(x, weight, bias, geometry) or not _is_plain_mode():
        return None
    tensors = (x, weight) if bias is None else (x, weight, bias)
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    outputs, groups = weight.shape[0], geometry.groups
    positions = (
        math.prod(x.shape[:-1])
        if geometry.dims == 0
        else x.shape[0] * math.prod(geometry.output_size(geometry.size_of(x)))
    )
    work = positions * weight.numel()
    if (
        work < _LEAST_WORK
        or (differentiates and positions < _LEAST_TRAINED_POSITIONS)
        or not _has_kernel(x.element_size())
    ):
        return None
    if not torch.ops.aten.is_non_overlapping_and_dense(x):
        x = x.contiguous()
    density = estimate_density(x.detach())
    if density > 0.9:
        return None
    packed_bias = None if bias is None else bias.detach().contiguous()

    def events(x: Tensor) -> Tensor:
        return product(x, geometry, outputs, packed_weight(weight, groups).tiles, packed_bias)

    def dense(x: Tensor) -> Tensor:
        if geometry.dims == 0:
            return function(x, weight, bias)
        keep = 3 - geometry.dims
        return function(
            x, weight, bias, geometry.stride[keep:], geometry.padding[keep:], geometry.dilation[keep:], groups
        )

    limit = _crossover_of(x.detach(), weight, geometry, work, dense, events)
    packed = packed_weight(weight, groups) if density < limit else None  # checks the content: once a call
    by_events = packed is not None and packed.is_finite
    _decisions[owner] = Decision(by_events, density, limit)
    if packed is None or not by_events:
        return None
    if not differentiates:
        return product(x, geometry, outputs, packed.tiles, packed_bias)
    return differentiable_product(x, weight, bias, packed.tiles, geometry, density < _GRADIENT_PART * limit)


def _crossover_of(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    work: int,
    dense: Callable[[Tensor], Tensor],
    events: Callable[[Tensor], Tensor],
) -> float:
    """The crossover for the shape of a call; batches whose sizes have the same number of bits share one."""
    batch = x.shape[0] if geometry.dims else math.prod(x.shape[:-1])
    is_row_major = x.is_contiguous()
    key = (
        geometry,
        tuple(weight.shape),
        geometry.dims and tuple(x.shape[2:]),
        batch.bit_length(),
        x.dtype,
        is_row_major,
    )
    part = max(1, min(batch, batch * _CALIBRATION_WORK // work))
    example = x.reshape(batch, x.shape[-1])[:part] if geometry.dims == 0 else x[:part]
    return crossover(key, example, dense, events)


def _is_supported(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    if x.dtype not in (torch.float32, torch.float64) or not x.is_cpu or x.layout is not torch.strided:
        return False
    for tensor in (weight, bias):
        if tensor is not None and (tensor.dtype != x.dtype or not tensor.is_cpu or tensor.layout is not torch.strided):
            return False
    dims, channels = geometry.dims, weight.shape[1]
    if x.dim() < 2 or (dims and x.dim() != dims + 2) or x.shape[-1 if dims == 0 else 1] != channels * geometry.groups:
        return False
    outputs_of_group = weight.shape[0] // geometry.groups
    if outputs_of_group < _LEAST_OUTPUTS or not fits_lists(geometry, channels):
        return False
    return bool(torch.ops.aten.is_non_overlapping_and_dense(weight))


def _is_plain_mode() -> bool:
    return not (
        dispatch_mode_count()
        or are_transforms_active()
        or forward_mode_level() >= 0
        or tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


_built: dict[tuple[int, str], bool] = {}
"""By bytes of an element and compiler: another compiler may succeed where one failed."""


def _has_kernel(itemsize: int) -> bool:
    """Whether the kernel can be built; warns once for each compiler that fails."""
    compiler = find_compiler()
    if compiler is None:
        return False
    key = itemsize, compiler
    if key not in _built:
        try:
            build(itemsize)
            _built[key] = True
        except LoweringRefused as reason:
            _built[key] = False
            warn_once(
                "SNNFX505",
                f'layers run densely: {reason}. Set CXX to another C++ compiler, or convert with lower="dense".',
                key=("build events", compiler),
            )
    return _built[key]
