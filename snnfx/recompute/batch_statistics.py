"""BatchNorm in training, split into batch statistics and normalisation.

The statistics need all steps and samples but return only a few numbers; the normalisation can run on any part of the
sequence. A BatchNorm in one operation needs the whole sequence before and after it. Gradients match torch's kernel: the
gradient through mean and variance is `a + b x` for each element x of a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.ops.batched_gradients import for_each_gradient
from snnfx.ops.first_derivatives import refuse_second_derivative
from snnfx.ops.memory_format import stack_in_layout
from snnfx.ops.step_batch_norm import batch_norm_per_step, is_dense, update_factors
from snnfx.recompute.bit_packing import empty_steps, memory_order
from snnfx.sandbox.torch_internals import BatchNormBase, check_batch_size
from snnfx.state.leaf_modules import call_leaf

__all__ = [
    "add_gradient_of_statistics",
    "as_non_view",
    "batch_statistics",
    "normalize",
    "step_statistics",
    "uses_batch_statistics",
]

_WHAT = "a BatchNorm whose statistics are computed separately"
_HINT = "Convert with checkpoint=None, lower=None: PyTorch then builds the autograd graph."


def batch_statistics(x_seq: Tensor, module: BatchNormBase) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all steps and samples.

    Updates the running statistics as a call of the module does. In evaluation mode, returns the running statistics.

    Args:
        x_seq: `[T, N, C, *]`.
        module: a BatchNorm without hooks.

    Returns:
        Two tensors `[C]`.
    """
    x = x_seq.flatten(0, 1)
    module._check_input_dim(x)
    running = (module.running_mean, module.running_var)
    if not uses_batch_statistics(module):
        return running  # type: ignore[return-value]
    if not x.is_meta:
        check_batch_size(list(x.shape))
    (factor,) = update_factors(module, 1)
    updated = running if module.training and module.track_running_stats else (None, None)
    return _Statistics.apply(x_seq, *updated, factor)  # type: ignore[no-any-return]


def step_statistics(x_seq: Tensor, module: BatchNormBase) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel at each time step, as `batch_statistics`: two tensors `[T, C]`."""
    module._check_input_dim(x_seq[0])
    T, running = x_seq.shape[0], (module.running_mean, module.running_var)
    if not uses_batch_statistics(module):
        mean, var = running
        assert mean is not None and var is not None
        return mean.expand(T, -1), var.expand(T, -1)
    if not x_seq.is_meta:
        check_batch_size(list(x_seq.shape[1:]))
    factors = update_factors(module, T)
    updated = running if module.training and module.track_running_stats else (None, None)
    return _Statistics.apply(x_seq, *updated, factors)  # type: ignore[no-any-return]


def uses_batch_statistics(module: BatchNormBase) -> bool:
    """Whether a BatchNorm normalises by batch statistics, not by running statistics."""
    return module.training or (module.running_mean is None and module.running_var is None)


def normalize(
    x_seq: Tensor, mean: Tensor | None, var: Tensor | None, module: BatchNormBase, per_step: bool = False
) -> Tensor:
    """Normalise a sequence `[T, N, C, *]`, or a part of it, by these statistics.

    Args:
        x_seq: the sequence.
        mean, var: `[C]` or, with `per_step`, `[T, C]`; None: call the module with the whole sequence.
        module: a BatchNorm.
        per_step: whether each time step has its own statistics.
    """
    if mean is None or var is None:
        if per_step:
            return batch_norm_per_step(x_seq, module)
        return call_leaf(module, x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])  # type: ignore[no-any-return]
    return _NormalizeFunction.apply(x_seq, mean, var, module.weight, module.bias, module.eps)  # type: ignore[no-any-return]


def add_gradient_of_statistics(
    grad: Tensor, x_seq: Tensor, mean: Tensor, grad_of_mean: Tensor, grad_of_var: Tensor, count: int
) -> None:
    """Add the gradient through the statistics to the gradient of a sequence, or of a part of it.

    Args:
        grad: `[T, N, C, *]`, changed in place.
        x_seq: the sequence.
        mean: `[C]` or `[T, C]`.
        grad_of_mean, grad_of_var: gradients of the statistics, of the same shape.
        count: the number of elements that each mean is taken over.
    """
    slope = grad_of_var * (2.0 / count)
    offset = grad_of_mean / count - slope * mean
    shape = (-1, *(1,) * (x_seq.dim() - 3))
    for t, (g, x) in enumerate(zip(grad.unbind(0), x_seq.unbind(0), strict=True)):
        # Step by step, so that the second operation finds its operand in the cache.
        a, b = (v[t] if mean.dim() == 2 else v for v in (offset, slope))
        if g.dtype == a.dtype == x.dtype:
            g.addcmul_(x, b.view(shape)).add_(a.view(shape))
        else:
            g += torch.addcmul(a.view(shape), x.to(a.dtype), b.view(shape)).to(g.dtype)


def _parts(x_seq: Tensor, each_step: bool) -> list[Tensor]:
    """The sequence as one batch `[T*N, C, *]` if no copy is needed, else its steps, `[N, C, *]` each."""
    if not each_step:
        batch = x_seq.flatten(0, 1) if x_seq.shape[0] == 1 or _is_view_as_batch(x_seq) else None
        if batch is not None and is_dense(batch):
            return [batch]
    return [x if is_dense(x) else x.contiguous() for x in x_seq.unbind(0)]


def _is_view_as_batch(x_seq: Tensor) -> bool:
    return x_seq.shape[1] == 1 or x_seq.stride(0) == x_seq.shape[1] * x_seq.stride(1)


class _Statistics(torch.autograd.Function):
    """Statistics of the whole sequence or, with a list of update factors, of each step."""

    @staticmethod
    def forward(
        ctx: Any, x_seq: Tensor, running_mean: Tensor | None, running_var: Tensor | None, factor: float | list[float]
    ) -> tuple[Tensor, Tensor]:
        each_step = isinstance(factor, list)
        if x_seq.is_meta:
            sizes = (x_seq.shape[0], x_seq.shape[2]) if each_step else x_seq.shape[2:3]
            dtype = torch.promote_types(x_seq.dtype, torch.float32)
            mean, var = (torch.empty(sizes, dtype=dtype, device="meta") for _ in range(2))
            ctx.save_for_backward(x_seq, mean)
            return mean, var
        parts = list(x_seq.unbind(0)) if each_step else [x_seq.flatten(0, 1)]
        factors = factor if isinstance(factor, list) else [factor]
        statistics = [
            _statistics_of(x if is_dense(x) else x.contiguous(), running_mean, running_var, f)
            for x, f in zip(parts, factors, strict=True)
        ]
        mean, var = (torch.stack(list(values)) if each_step else values[0] for values in zip(*statistics, strict=True))
        ctx.save_for_backward(x_seq, mean)
        ctx.count = parts[0].numel() // max(1, parts[0].shape[1])
        ctx.set_materialize_grads(False)
        return mean, var

    @staticmethod
    def backward(
        ctx: Any, grad_of_mean: Tensor | None, grad_of_var: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        refuse_second_derivative(_WHAT, _HINT)
        x_seq, mean = ctx.saved_tensors
        if x_seq.is_meta:
            return _without_data(x_seq), None, None, None
        count = ctx.count

        def backward(of_statistics: Sequence[Tensor | None]) -> list[Tensor]:
            grad = torch.zeros_like(x_seq)
            of_mean, of_var = (torch.zeros_like(mean) if g is None else g for g in of_statistics)
            add_gradient_of_statistics(grad, x_seq, mean, of_mean, of_var, count)
            return [grad]

        (grad,) = for_each_gradient(backward, (grad_of_mean, grad_of_var))
        return grad, None, None, None


def _statistics_of(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, factor: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of `[N, C, *]`, in float32 at least."""
    channels = x.shape[1]
    if running_mean is None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        running_mean, running_var = (torch.zeros(channels, dtype=dtype, device=x.device) for _ in range(2))
    return torch.ops.aten.batch_norm_update_stats(x, running_mean, running_var, factor)  # type: ignore[no-any-return]


class _NormalizeFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_seq: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x_seq, mean, var, weight)
        ctx.eps, each_step = eps, mean.dim() == 2
        if x_seq.is_meta:
            return _without_data(x_seq)
        parts = _parts(x_seq, each_step)
        if len(parts) == 1 and not each_step:
            y = torch.ops.aten.native_batch_norm(parts[0], weight, bias, mean, var, False, 0.0, eps)[0]
            return as_non_view(y.unflatten(0, x_seq.shape[:2]))
        y_seq = empty_steps(x_seq.shape, memory_order(x_seq), x_seq.dtype, x_seq.device)
        for t, (x, y) in enumerate(zip(parts, y_seq.unbind(0), strict=True)):
            arguments = (weight, bias, _of_step(mean, t), _of_step(var, t), False, 0.0, eps)
            if x.stride() != y.stride():
                y.copy_(torch.ops.aten.native_batch_norm(x, *arguments)[0])
            else:
                # torch's kernel ignores the strides of `out=` and uses the strides of the input.
                unused = [mean.new_empty(0) for _ in range(2)]
                torch.ops.aten.native_batch_norm.out(x, *arguments, out=y, save_mean=unused[0], save_invstd=unused[1])
        return y_seq

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(_WHAT, _HINT)
        x_seq, mean, var, weight = ctx.saved_tensors
        if x_seq.is_meta:
            inputs = (x_seq, mean, var, weight, weight)
            needed = zip(inputs, ctx.needs_input_grad, strict=False)
            return *(_without_data(x) if need else None for x, need in needed), None
        needs, eps = ctx.needs_input_grad, ctx.eps
        of_inputs = for_each_gradient(
            lambda grads: _backward_of_normalize(grads[0], x_seq, mean, var, weight, eps, needs), (grad,)
        )
        return *of_inputs, None


def _backward_of_normalize(
    grad: Tensor | None,
    x_seq: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the sequence, mean, variance, weight and bias."""
    assert grad is not None
    each_step = mean.dim() == 2
    parts = _parts(x_seq, each_step)
    as_one = len(parts) == 1 and not each_step
    grads = [grad.flatten(0, 1)] if as_one else grad.unbind(0)
    parts_of_grads: list[Any] = []
    for t, (g, x) in enumerate(zip(grads, parts, strict=True)):
        m, v = _of_step(mean, t), _of_step(var, t)
        arguments = (g, x, weight, m, v, None, None, False, eps, [True, True, True])
        parts_of_grads.append(torch.ops.aten.native_batch_norm_backward(*arguments))
    of_x, of_weight, of_bias = (list(values) for values in zip(*parts_of_grads, strict=True))
    # The gradients of weight and bias are sums of the incoming gradient, with and without the normalised input.
    scaled, plain = torch.stack(of_weight), torch.stack(of_bias)
    inverse = torch.rsqrt(var + eps)
    scale = inverse if weight is None else inverse * weight
    through_mean, through_var = -scale * plain, -0.5 * inverse * scale * scaled
    if not each_step:
        through_mean, through_var = through_mean.sum(0), through_var.sum(0)
    of_x_seq = of_x[0].unflatten(0, x_seq.shape[:2]) if as_one else stack_in_layout(of_x)
    return [
        of_x_seq if needs[0] else None,
        through_mean if needs[1] else None,
        through_var if needs[2] else None,
        scaled.sum(0) if needs[3] else None,
        plain.sum(0) if needs[4] else None,
    ]


def as_non_view(y: Tensor) -> Tensor:
    """The same tensor as a non-view: autograd forbids in-place changes of views that an `autograd.Function` returns."""
    if not y._is_view():
        return y
    result = torch.empty(0, dtype=y.dtype, device=y.device)
    return result.set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _without_data(like: Tensor) -> Tensor:
    """`torch.empty_like` of a meta tensor, ten times faster."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def _of_step(value: Tensor, t: int) -> Tensor:
    return value[t] if value.dim() == 2 else value
