"""Run a product of two matrices densely or by events, as in spiking attention.

The operand from spikes may be the first one, the second one, or both: `q @ k.T` counts common spikes, `attention @ v`
and `q @ (k.T @ v)` add rows. Region graphs call `matmul_by_events` for the products that
`snnfx.passes.choose_event_layers` marks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.events.crossovers import crossover
from snnfx.lowering.events.event_gradients import gradient_by_events
from snnfx.lowering.events.event_kernel import estimate_density
from snnfx.lowering.events.geometry import LINEAR
from snnfx.lowering.events.layer_decisions import (
    DENSE,
    PLAIN,
    Decision,
    gradient_crossover_of,
    has_kernel,
    is_plain_mode,
)
from snnfx.lowering.events.matrix_kernel import MOST_BATCH_DIMS, product_of_matrices
from snnfx.ops.batched_gradients import is_plain_gradient

__all__ = ["decision_at", "matmul_by_events"]

_LEAST_WORK = 1 << 20
"""Multiplications from which on the decision costs little."""

_CALIBRATION_WORK = 1 << 27
"""Multiplications of one dense call of a calibration, about."""

_decisions: dict[int, Decision] = {}


def decision_at(site: int) -> Decision | None:
    """How the latest call of a product ran; None if there was none, or it was too small for a decision."""
    return _decisions.get(site)


def matmul_by_events(a: Tensor, b: Tensor, spikes: str, site: int) -> Tensor:
    """`torch.matmul`, densely or by events.

    Args:
        a, b: the operands.
        spikes: the operands that come from spikes: "first", "second" or "both".
        site: the number of the product.
    """
    if type(b) in PLAIN and type(a) is Tensor and b.dim() == 2 < a.dim() and spikes == "first":
        folded: Tensor = matmul_by_events(a.flatten(0, -2), b, spikes, site)
        return folded.view(*a.shape[:-1], b.shape[1])
    if _is_supported(a, b):
        sparse, other = (b.mT, a.mT) if spikes == "second" else (a, b)
        density, limit = _density(sparse), None
        if density <= DENSE:
            limit = _crossover(sparse, other, spikes)
        y: Tensor | None = None
        if limit is not None and density < limit:
            differentiates = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
            product = _product(a.detach(), b.detach(), spikes)
            y = product
            if differentiates and product is not None:
                y = _SpikeMatmul.apply(lambda: product, a, b, spikes, _gradient_of_second(a, b, spikes, density))
        is_finite = y is not None or limit is None or density >= limit
        _decisions[site] = Decision(y is not None, density, limit, is_finite)
        if y is not None:
            return y
    return torch.matmul(a, b)


def _is_supported(a: Any, b: Any) -> bool:
    if torch.compiler.is_compiling() or type(a) not in PLAIN or type(b) not in PLAIN:
        return False
    rank = a.dim()
    if rank < 2 or rank > MOST_BATCH_DIMS + 2 or b.dim() != rank or a.shape[:-2] != b.shape[:-2]:
        return False
    if a.shape[-1] != b.shape[-2] or a.numel() * b.shape[-1] < _LEAST_WORK:
        return False
    if a.dtype not in (torch.float32, torch.float64) or b.dtype != a.dtype or not (a.is_cpu and b.is_cpu):
        return False
    if a.layout is not torch.strided or b.layout is not torch.strided or a.is_neg() or b.is_neg():
        return False
    return is_plain_mode() and has_kernel(a.element_size())


def _density(x: Tensor) -> float:
    x = x.detach()
    return estimate_density(x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous())


def _product(a: Tensor, b: Tensor, spikes: str) -> Tensor | None:
    """The product by events, row-major; None if the other operand is not finite."""
    if spikes == "second":
        y = product_of_matrices(b.mT, a.mT, False)
        return None if y is None else y.mT.contiguous()
    return product_of_matrices(a, b, spikes == "both")


def _crossover(sparse: Tensor, other: Tensor, spikes: str) -> float:
    images = sparse.shape[:-2].numel().bit_length()
    key: tuple[object, ...] = ("matmul", spikes, tuple(sparse.shape[-2:]), other.shape[-1], images)
    key += (tuple(sparse.stride()[-2:]), tuple(other.stride()[-2:]), sparse.dtype)
    work = sparse.numel() * other.shape[-1]
    part = max(1, min(len(sparse), len(sparse) * _CALIBRATION_WORK // work)) if sparse.dim() > 2 else len(sparse)
    example, second = sparse.detach()[:part], other.detach()
    second = second[:part] if sparse.dim() > 2 else second
    finite: list[Tensor] = []  # made only if the crossover is measured

    def as_written(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Any]:
        def call(x: Tensor) -> Any:
            if not finite:  # the kernel refuses other values at once, and its time would be remembered
                finite.append(second if second.isfinite().all() else second.nan_to_num(0.0, 0.0, 0.0))
            return function(finite[0].mT, x.mT) if spikes == "second" else function(x, finite[0])

        return call

    return crossover(key, example, as_written(torch.matmul), as_written(lambda a, b: _product(a, b, spikes)))


def _gradient_of_second(
    a: Tensor, b: Tensor, spikes: str, density: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor | None] | None:
    """A function `(gradient of the product, both operands) -> gradient of the second operand`, by events."""
    if spikes == "second" or not b.requires_grad:
        return None
    if a.dim() > 2:  # short sums over tokens
        return lambda grad, a, _: product_of_matrices(a.mT, grad, False)
    work = a.numel() * b.shape[1]
    if b.shape[1] < 8 or density >= gradient_crossover_of(a, b.mT, LINEAR, work):
        return None
    return lambda grad, a, b: gradient_by_events(grad, a, b.mT, LINEAR).mT


class _SpikeMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[], Tensor],
        a: Tensor,
        b: Tensor,
        spikes: str,
        gradient_of_second: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None,
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.spikes, ctx.gradient_of_second = spikes, gradient_of_second
        return compute()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad[1:3]
        grad_a = grad_b = None
        is_plain = is_plain_gradient(grad) and is_plain_gradient(a) and is_plain_gradient(b)
        if is_plain and needs_a and ctx.spikes != "first":
            grad_a = product_of_matrices(b, grad.mT, False)
            grad_a = None if grad_a is None else grad_a.mT
        if is_plain and needs_b and ctx.gradient_of_second is not None:
            grad_b = ctx.gradient_of_second(grad, a, b)
        if needs_a and grad_a is None:
            grad_a = grad @ b.mT
        if needs_b and grad_b is None:
            grad_b = a.mT @ grad
        return None, grad_a, grad_b, None, None
