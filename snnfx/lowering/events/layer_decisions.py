"""How a layer may run, and how its latest call ran: conditions, geometry, crossover and decision.

A layer runs densely under torch.compile, torch.export, torch.func, forward-mode AD, dispatch modes, hooks, autocast or
tracing; for dtypes other than float32 and float64; on devices other than the CPU; if its weight is not finite; or if
its work is so small that the decision would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from snnfx.errors import warn_once
from snnfx.lowering.aten_recording import LoweringRefused
from snnfx.lowering.choices.linear_layers import gradients_by_one_dnn
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.events.crossovers import crossover
from snnfx.lowering.events.event_gradients import dense_gradient, gradient_by_events
from snnfx.lowering.events.event_kernel import build, fits_lists
from snnfx.lowering.events.few_rows import build_few_rows
from snnfx.lowering.events.few_rows_gradients import build_gradients
from snnfx.lowering.events.geometry import LINEAR, Geometry, convolution
from snnfx.lowering.events.matrix_kernel import build_matrix_products
from snnfx.sandbox.torch_internals import (
    are_transforms_active,
    dispatch_mode_count,
    forward_mode_level,
    has_global_hooks,
    tracing_state,
)
from snnfx.state.hooks import has_forward_hooks

__all__ = [
    "DENSE",
    "LAYERS",
    "LEAST_WORK",
    "PLAIN",
    "Decision",
    "crossover_of",
    "decision_of",
    "forget_decision",
    "geometry_of_layer",
    "geometry_of_settings",
    "gradient_crossover_of",
    "has_kernel",
    "is_plain_call",
    "is_plain_mode",
    "is_supported",
    "latest_decision",
    "positions_of",
]

LAYERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: functional.linear,
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
"""Layer class -> its function. Subclasses are excluded."""

LEAST_WORK = 1 << 24
"""Multiplications from which on the decision costs little: a few microseconds."""

DENSE = 0.9
"""The density from which on no crossover is measured."""

_LEAST_OUTPUTS = 8
"""Outputs of a group: with fewer, most lanes of a vector would be idle."""

_CALIBRATION_WORK = 1 << 29
"""Multiplications of one dense call of a calibration, about."""

_DENSE_WAY = ("faster library",)
"""Part of the keys of crossovers: how the dense products are computed that they are compared with."""

PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@dataclass
class Decision:
    """How the latest call of a layer ran; each weight has one, which each call updates.

    Args:
        by_events: whether it visited only the inputs that are not zero.
        density: the estimated fraction of inputs that are not zero.
        crossover: the density below which the layer runs by events; None: it is so dense that this was not asked for.
        is_finite: whether the weight is finite, as far as that was checked.
        is_known: whether the latest call decided at all.
    """

    by_events: bool
    density: float
    crossover: float | None
    is_finite: bool = True
    is_known: bool = True

    def update(self, by_events: bool, density: float, crossover: float | None, is_finite: bool = True) -> None:
        """Record a call."""
        self.by_events, self.density, self.crossover, self.is_finite = by_events, density, crossover, is_finite
        self.is_known = True


_decisions: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By the layer's weight."""


def latest_decision(weight: Tensor) -> Decision | None:
    """How the latest call with a weight ran, except for small ones; None if there was none, or it was not plain."""
    found: Decision | None = _decisions.get(weight)
    return replace(found) if found is not None and found.is_known else None


def decision_of(weight: Tensor) -> Decision:
    """The decision that calls with a weight update."""
    found: Decision | None = _decisions.get(weight)
    return _decisions.setdefault(weight, Decision(False, 0.0, None, is_known=False)) if found is None else found


def forget_decision(weight: Tensor) -> None:
    """Note that the latest call with a weight ran densely without a decision."""
    found: Decision | None = _decisions.get(weight)
    if found is not None:
        found.is_known = False


def is_plain_call(layer: Any) -> bool:
    """Whether a call of a layer is its function on its weight and bias."""
    return (
        "forward" not in layer.__dict__
        and not has_forward_hooks(layer)
        and not has_global_hooks()
        and type(layer.weight) in PLAIN
        and (layer.bias is None or type(layer.bias) in PLAIN)
        and getattr(layer, "padding_mode", "zeros") == "zeros"
    )


def geometry_of_layer(layer: Any, weight: Tensor) -> Geometry | None:
    """The geometry of a layer of `LAYERS`; None if there is none."""
    if isinstance(layer, nn.Linear):
        return LINEAR
    return geometry_of_settings(weight, layer.stride, layer.padding, layer.dilation, layer.groups)


_geometries: dict[tuple[object, ...], Geometry | None] = {}


def geometry_of_settings(weight: Tensor, *settings: Any) -> Geometry | None:
    """A cached `convolution(weight, *settings)`."""
    stride, padding, dilation = (tuple(s) if isinstance(s, list) else s for s in settings[:3])
    groups: int = settings[3]
    key = weight.shape, stride, padding, dilation, groups
    if key not in _geometries:
        _geometries[key] = convolution(weight, stride, padding, dilation, groups)
    return _geometries[key]


def crossover_of(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    work: int,
    reads_in_place: bool,
    dense: Callable[[Tensor], Tensor],
    events: Callable[[Tensor], Tensor | None],
) -> float:
    """The crossover for the shape of a call; batches whose sizes have the same number of bits share one."""
    key, example = _example(x, weight, geometry, work)
    return crossover((*key, "in place" if reads_in_place else "packed", *_DENSE_WAY), example, dense, events)


def gradient_crossover_of(x: Tensor, weight: Tensor, geometry: Geometry, work: int) -> float:
    """The crossover of the gradient of the weight."""
    key, example = _example(x.detach(), weight, geometry, work)
    layer, weight = weight, weight.detach()

    def grad_of(x: Tensor) -> Tensor:
        if geometry.dims == 0:
            return torch.ones(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device="cpu")
        out = geometry.output_size(geometry.size_of(x.shape))[3 - geometry.dims :]
        ones = torch.ones(x.shape[0], *out, weight.shape[0], dtype=x.dtype, device="cpu").movedim(-1, 1)
        return ones.contiguous() if x.is_contiguous() else ones

    grads: list[Tensor] = []  # made only if the crossover is measured

    def grad(x: Tensor) -> Tensor:
        if not grads:
            grads.append(grad_of(x))
        return grads[0]

    def dense(given: Tensor) -> Tensor:
        by_one_dnn = geometry.dims == 0 and gradients_by_one_dnn(x, layer)[1]
        return dense_gradient(grad(given), given, weight, geometry, by_one_dnn)

    return crossover(
        (*key, "gradient", *_DENSE_WAY),
        example,
        dense,
        lambda x: gradient_by_events(grad(x), x, weight, geometry),
    )


def _example(x: Tensor, weight: Tensor, geometry: Geometry, work: int) -> tuple[tuple[object, ...], Tensor]:
    """The key of the crossover of a call, and a part of its input for a measurement."""
    batch = x.shape[0] if geometry.dims else math.prod(x.shape[:-1])
    key = (
        geometry,
        tuple(weight.shape),
        geometry.dims and tuple(x.shape[2:]),
        batch.bit_length(),
        x.dtype,
        x.is_contiguous(),
    )
    part = max(1, min(batch, batch * _CALIBRATION_WORK // work))
    return key, x.reshape(batch, x.shape[-1])[:part] if geometry.dims == 0 else x[:part]


def is_supported(
    shape: Sequence[int], dtype: torch.dtype, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> bool:
    """Whether there is a kernel for an input of a shape and dtype, on the CPU."""
    if dtype not in (torch.float32, torch.float64):
        return False
    for tensor in (weight, bias):
        if tensor is not None and (tensor.dtype != dtype or not tensor.is_cpu or tensor.layout is not torch.strided):
            return False
    dims = geometry.dims
    if weight.dim() != dims + 2 or len(shape) < 2 or (dims and len(shape) != dims + 2):
        return False
    outputs, channels = weight.shape[:2]
    if shape[1 if dims else -1] != channels * geometry.groups or (bias is not None and bias.shape != (outputs,)):
        return False  # a linear layer broadcasts a bias of another shape; torch refuses all other mismatches
    if min(geometry.output_size(geometry.size_of(shape))) < 1:
        return False
    outputs_of_group = outputs // geometry.groups
    if outputs_of_group < _LEAST_OUTPUTS or not fits_lists(geometry, channels):
        return False
    return bool(torch.ops.aten.is_non_overlapping_and_dense(weight))


def positions_of(shape: Sequence[int], geometry: Geometry) -> int:
    """The number of output pixels, or of rows."""
    if geometry.dims == 0:
        return math.prod(shape[:-1])
    return shape[0] * math.prod(geometry.output_size(geometry.size_of(shape)))


def is_plain_mode() -> bool:
    """Whether nothing intercepts the operations of this thread."""
    return not (
        dispatch_mode_count()
        or are_transforms_active()
        or forward_mode_level() >= 0
        or tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


_built: dict[tuple[int, str], bool] = {}
"""By bytes of an element and compiler: another compiler may succeed where one failed."""


def has_kernel(itemsize: int) -> bool:
    """Whether the kernel can be built; warns once for each compiler that fails."""
    compiler = find_compiler()
    if compiler is None:
        return False
    key = itemsize, compiler
    if key not in _built:
        try:
            build(itemsize)
            build_few_rows(itemsize)
            build_gradients(itemsize)
            build_matrix_products(itemsize)
            _built[key] = True
        except LoweringRefused as reason:
            _built[key] = False
            warn_once(
                "SNNFX505",
                f'layers run densely: {reason}. Set CXX to another C++ compiler, or convert with lower="dense".',
                key=("build events", compiler),
            )
    return _built[key]
