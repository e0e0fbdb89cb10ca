"""A product by events with gradients: that of the weight by events as well, that of the input densely.

The rows of a linear layer may be so few that one pass over the weight is the fastest way for both gradients.

The gradient of the weight adds, for each active input, the gradient of the outputs to one row. The gradient of the
input has no zeros to skip. Where a gradient is itself differentiated or batched, all gradients are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.choices.linear_layers import gradients_by_one_dnn, gradients_of_linear
from snnfx.lowering.events.event_kernel import weight_gradient
from snnfx.lowering.events.few_rows_gradients import gradient_of_input, gradient_of_weight
from snnfx.lowering.events.geometry import Geometry
from snnfx.lowering.events.packed_weights import unpack
from snnfx.ops.batched_gradients import is_plain_gradient

__all__ = ["Gradients", "dense_gradient", "differentiable_product", "gradient_by_events"]


class Gradients(Enum):
    """How the gradients of a product run."""

    DENSE = "both by torch"
    WEIGHT_BY_EVENTS = "the gradient of the weight by events, the gradient of the input by torch"
    FEW_ROWS = "both by one pass over the weight, see `snnfx.lowering.events.few_rows_gradients`"


def differentiable_product(
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    gradients: Gradients,
) -> Tensor:
    """The product by events, recorded by autograd.

    Args:
        compute: computes the product of the input.
        x, weight, bias, geometry: the operands.
        gradients: how the gradients run, unless they are themselves differentiated or batched.
    """
    if geometry.dims == 0:
        weight = weight.view_as(weight)  # as torch saves it: another `weight.data` before backward changes nothing
    y: Tensor = _EventProduct.apply(compute, x, weight, bias, geometry, gradients)
    return y


class _EventProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[Tensor], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        gradients: Gradients,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.gradients, ctx.has_bias = geometry, gradients, bias is not None
        is_by_library = geometry.dims == 0 and gradients is not Gradients.FEW_ROWS
        ctx.by_one_dnn = gradients_by_one_dnn(x, weight) if is_by_library else (False, False)
        return compute(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
        needs_bias = needs_bias and ctx.has_bias
        is_plain = is_plain_gradient(grad) and is_plain_gradient(x)
        gradients = ctx.gradients if is_plain else Gradients.DENSE
        if gradients is Gradients.FEW_ROWS:
            outputs, inputs = weight.shape
            rows = grad.reshape(-1, outputs).contiguous()
            grad_x = gradient_of_input(rows, weight).view(x.shape) if needs_x else None
            grad_weight = gradient_of_weight(rows, x.reshape(-1, inputs).contiguous()) if needs_weight else None
            return None, grad_x, grad_weight, rows.sum(0) if needs_bias else None, None, None
        by_events = gradients is Gradients.WEIGHT_BY_EVENTS and needs_weight
        needs = needs_x, needs_weight and not by_events, needs_bias
        by_one_dnn = ctx.by_one_dnn if is_plain else (False, False)
        grad_x, grad_weight, grad_bias = _dense_gradients(grad, x, weight, ctx.geometry, by_one_dnn, needs)
        if by_events:
            grad_weight = gradient_by_events(grad, x, weight, ctx.geometry)
        return None, grad_x, grad_weight, grad_bias, None, None


def gradient_by_events(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of a weight by events, from the gradient of the output; densely if that one is not finite."""
    tiles = weight_gradient(x, geometry, weight.shape[0], grad)
    if tiles is None:
        return dense_gradient(grad, x, weight, geometry, by_one_dnn=False)
    return unpack(tiles, weight.shape, geometry.groups)


def dense_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, by_one_dnn: bool) -> Tensor:
    """The gradient of a weight by torch or oneDNN, from the gradient of the output."""
    gradient = _dense_gradients(grad, x, weight, geometry, (False, by_one_dnn), (False, True, False))[1]
    assert gradient is not None
    return gradient


def _dense_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    by_one_dnn: tuple[bool, bool],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias."""
    if geometry.dims == 0:
        return gradients_of_linear(grad, x, weight, by_one_dnn, needs)
    keep = 3 - geometry.dims
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [weight.shape[0]] if needs[2] else None,
        geometry.stride[keep:],
        geometry.padding[keep:],
        geometry.dilation[keep:],
        False,
        [0] * geometry.dims,
        geometry.groups,
        needs,
    )
    return grads
