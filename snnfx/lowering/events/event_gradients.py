"""A product by events with gradients: that of the weight by events as well, that of the input densely.

The gradient of the weight adds, for each active input, the gradient of the outputs to one row. The gradient of the
input has no zeros to skip. Where a gradient is itself differentiated or batched, all gradients are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.events.event_kernel import weight_gradient
from snnfx.lowering.events.geometry import Geometry
from snnfx.lowering.events.packed_weights import unpack
from snnfx.sandbox.torch_internals import are_transforms_active, dispatch_mode_count, is_batched_by_autograd

__all__ = ["differentiable_product"]


def differentiable_product(
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    gradient_by_events: bool,
) -> Tensor:
    """The product by events, recorded by autograd.

    Args:
        compute: computes the product of the input.
        x, weight, bias, geometry: the operands.
        gradient_by_events: whether the gradient of the weight runs by events.
    """
    y: Tensor = _EventProduct.apply(compute, x, weight, bias, geometry, gradient_by_events)
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
        gradient_by_events: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.by_events, ctx.has_bias = geometry, gradient_by_events, bias is not None
        return compute(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
        by_events = ctx.by_events and needs_weight and _is_plain(grad) and _is_plain(x)
        grads = _dense_gradients(
            grad, x, weight, ctx.geometry, (needs_x, needs_weight and not by_events, needs_bias and ctx.has_bias)
        )
        grad_x, grad_weight, grad_bias = grads
        if by_events:
            packed = weight_gradient(x, ctx.geometry, weight.shape[0], grad)
            grad_weight = unpack(packed, weight.shape, ctx.geometry.groups)
        return None, grad_x, grad_weight, grad_bias, None, None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is neither batched nor differentiated again."""
    return not (
        torch.is_grad_enabled()
        or type(tensor) is not Tensor
        or is_batched_by_autograd(tensor)
        or are_transforms_active()
        or dispatch_mode_count()
    )


def _dense_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias."""
    needs_x, needs_weight, needs_bias = needs
    if geometry.dims == 0:
        rows = grad.reshape(-1, weight.shape[0])
        return (
            grad @ weight if needs_x else None,
            rows.T @ x.reshape(-1, weight.shape[1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
    keep = 3 - geometry.dims
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [weight.shape[0]] if needs_bias else None,
        geometry.stride[keep:],
        geometry.padding[keep:],
        geometry.dilation[keep:],
        False,
        [0] * geometry.dims,
        geometry.groups,
        needs,
    )
    return grads
