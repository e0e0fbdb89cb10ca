"""BatchNorm with statistics of each time step, as one node of the autograd graph.

torch's kernel runs once for each step: it reads the step once for its statistics and once to normalise it. Tensor
operations over the whole sequence would take ten passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.ops.batched_gradients import for_each_gradient
from snnfx.ops.buffer_pool import empty_like
from snnfx.sandbox.torch_internals import BatchNormBase, are_transforms_active
from snnfx.state.leaf_modules import call_leaf

__all__ = ["batch_norm_per_step", "is_dense", "normalize_steps", "update_factors"]


def batch_norm_per_step(x_seq: Tensor, module: BatchNormBase) -> Tensor:
    """BatchNorm over `[T, N, C, *]` with the statistics of each step, equal to T successive calls.

    The running statistics take T updates. Under torch.compile and torch.func this is done in closed form (Ioffe &
    Szegedy 2015 for one update), also for SyncBatchNorm: with momentum m,
    `r_T = (1-m)^T r_0 + sum_t m (1-m)^(T-1-t) stat_t`.

    Args:
        x_seq: `[T, N, C, *]`.
        module: a BatchNorm module; in evaluation the steps are folded.
    """
    T = x_seq.shape[0]
    if module._forward_hooks or module._forward_pre_hooks:
        return torch.stack([call_leaf(module, x) for x in x_seq.unbind(0)])
    if not module.training and module.running_mean is not None:
        return call_leaf(module, x_seq.flatten(0, 1)).unflatten(0, (T, x_seq.shape[1]))  # type: ignore[no-any-return]
    module._check_input_dim(x_seq[0])
    count = x_seq[0].numel() // x_seq.shape[2]
    if module.training and count <= 1:
        return torch.stack([call_leaf(module, x) for x in x_seq.unbind(0)])  # torch raises its own error
    is_transformed = torch.compiler.is_compiling() or are_transforms_active()
    if not is_transformed and not isinstance(module, nn.SyncBatchNorm):
        return normalize_steps(x_seq, module)
    y, variance, mean = _normalized(x_seq, module.weight, module.bias, module.eps)
    if module.training and module.track_running_stats and module.running_mean is not None:
        with torch.no_grad():
            _update_running_statistics(module, mean.view(T, -1), variance.view(T, -1) * (count / (count - 1)))
    return y.to(x_seq.dtype)


def _update_running_statistics(module: BatchNormBase, mean: Tensor, variance: Tensor) -> None:
    T = mean.shape[0]
    assert module.num_batches_tracked is not None
    if module.momentum is None:
        seen = module.num_batches_tracked.to(mean.dtype)
        keep = seen / (seen + T)
        weights = (torch.ones(T, dtype=mean.dtype, device=mean.device) / (seen + T)).unsqueeze(1)
    else:
        age = torch.arange(T - 1, -1, -1, dtype=mean.dtype, device=mean.device)
        keep = torch.tensor(1.0 - module.momentum, dtype=mean.dtype, device=mean.device) ** T
        weights = (module.momentum * (1.0 - module.momentum) ** age).unsqueeze(1)
    for running, statistic in ((module.running_mean, mean), (module.running_var, variance)):
        assert running is not None
        running.copy_(keep * running + (weights * statistic).sum(0))
    module.num_batches_tracked.add_(T)


def update_factors(module: BatchNormBase, T: int) -> list[float]:
    """The momentum of each of T updates of the running statistics; adds T to `num_batches_tracked`."""
    if not (module.training and module.track_running_stats and module.num_batches_tracked is not None):
        return [module.momentum or 0.0] * T
    seen = module.num_batches_tracked
    factors = [module.momentum or 0.0] * T
    if module.momentum is None:
        before = 0 if seen.is_meta else int(seen)
        factors = [1.0 / (before + t + 1) for t in range(T)]
    seen.add_(T)
    return factors


def normalize_steps(x_seq: Tensor, module: BatchNormBase) -> Tensor:
    """Normalise each step with its own statistics, equal to T calls of a BatchNorm in training.

    Args:
        x_seq: `[T, N, C, *]`.
        module: a BatchNorm that uses the statistics of its input; its running statistics take T updates.

    Returns:
        `[T, N, C, *]`, in the memory format of `x_seq`.
    """
    T = x_seq.shape[0]
    running = module.training and module.track_running_stats and module.running_mean is not None
    factors = update_factors(module, T)
    statistics = (module.running_mean, module.running_var) if running else (None, None)
    return _NormalizeSteps.apply(x_seq, module.weight, module.bias, *statistics, factors, module.eps)  # type: ignore[no-any-return]


def is_dense(x: Tensor) -> bool:
    """Whether a step `[N, C, *]` is row-major or channels-last."""
    image = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.is_contiguous() or (image is not None and x.is_contiguous(memory_format=image))


def _dense(x_seq: Tensor) -> Tensor:
    return x_seq if is_dense(x_seq[0]) else x_seq.contiguous()


def _normalized(x_seq: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised sequence, variance and mean of each step, in twice differentiable operations."""
    dims = [1, *range(3, x_seq.dim())]
    variance, mean = torch.var_mean(x_seq, dims, correction=0, keepdim=True)
    y = (x_seq - mean) * torch.rsqrt(variance + eps)
    shape = (-1, *(1,) * (x_seq.dim() - 3))
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y, variance, mean


def _differentiable_gradients(
    x_seq: Tensor, weight: Tensor | None, bias: Tensor | None, ctx: Any, grad_seq: Tensor
) -> list[Tensor | None]:
    """The gradients with an autograd graph, for create_graph=True."""
    y, _, _ = _normalized(x_seq, weight, bias, ctx.eps)
    differentiated = [v if need else None for v, need in zip((x_seq, weight, bias), ctx.needs_input_grad, strict=False)]
    grads = iter(
        torch.autograd.grad(y, [v for v in differentiated if v is not None], grad_seq.to(y.dtype), create_graph=True)
    )
    return [None if v is None else next(grads) for v in differentiated]


class _NormalizeSteps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        factors: list[float],
        eps: float,
    ) -> Tensor:
        T, channels = x_seq.shape[0], x_seq.shape[2]
        given, x_seq = x_seq, _dense(x_seq)  # the kernel assumes that `out=` has the strides of the input
        y_seq = empty_like(x_seq)
        kind = x_seq.dtype if weight is None else weight.dtype
        means, deviations = (torch.empty(T, channels, dtype=kind, device=x_seq.device) for _ in range(2))
        steps = zip(x_seq.unbind(0), y_seq.unbind(0), means.unbind(0), deviations.unbind(0), factors, strict=True)
        for x, y, mean, deviation, factor in steps:
            torch.ops.aten.native_batch_norm.out(
                x,
                weight,
                bias,
                running_mean,
                running_var,
                True,
                factor,
                eps,
                out=y,
                save_mean=mean,
                save_invstd=deviation,
            )
        ctx.save_for_backward(given, weight, bias, means, deviations)
        ctx.eps = eps
        return y_seq

    @staticmethod
    def backward(ctx: Any, grad_seq: Tensor) -> tuple[Any, ...]:
        x_seq, weight, bias, means, deviations = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_gradients(x_seq, weight, bias, ctx, grad_seq), None, None, None, None
        mask, eps = list(ctx.needs_input_grad[:3]), ctx.eps
        x_seq = _dense(x_seq)
        of_inputs = for_each_gradient(
            lambda grads: _gradients_of_steps(grads[0], x_seq, weight, means, deviations, eps, mask), (grad_seq,)
        )
        return *of_inputs, None, None, None, None


def _gradients_of_steps(
    grad_seq: Tensor | None,
    x_seq: Tensor,
    weight: Tensor | None,
    means: Tensor,
    deviations: Tensor,
    eps: float,
    mask: list[bool],
) -> list[Tensor | None]:
    """The gradients of the sequence, weight and bias that `mask` asks for."""
    assert grad_seq is not None
    grad_x = empty_like(x_seq) if mask[0] else None
    grad_weight = grad_bias = None
    for t, (x, grad) in enumerate(zip(x_seq.unbind(0), grad_seq.unbind(0), strict=True)):
        g_x, g_weight, g_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, means[t], deviations[t], True, eps, mask
        )
        if grad_x is not None:
            grad_x[t] = g_x
        if mask[1]:
            grad_weight = g_weight if grad_weight is None else grad_weight.add_(g_weight)
        if mask[2]:
            grad_bias = g_bias if grad_bias is None else grad_bias.add_(g_bias)
    return [grad_x, grad_weight, grad_bias]
