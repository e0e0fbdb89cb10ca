"""BatchNorm in training as per-channel factors, for a loop that normalises its input itself.

`(x - mean) * scale + bias` is element-wise once mean and scale are known. The loop computes it in the same pass as the
neuron, so the normalised sequence is never stored. Its backward pass returns the gradients of `x` as if the statistics
were constants, of `scale` and of `bias`; the gradient through the statistics is `a + b * (x - mean)` for each channel,
which is added to the gradient of `x` in place.

Source: Ioffe & Szegedy, "Batch Normalization", 2015, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.batch_norm.channel_kernel import add_gradient_of_statistics, channel_statistics
from snnfx.lowering.batch_norm.channel_source import SOURCES
from snnfx.lowering.elementwise.cpp.build import builds
from snnfx.ops.batched_gradients import for_each_gradient
from snnfx.ops.first_derivatives import refuse_second_derivative
from snnfx.ops.step_batch_norm import is_dense, update_factors
from snnfx.sandbox.torch_internals import BatchNormBase, check_batch_size

__all__ = ["GradientOwner", "channel_factors", "takes_channel_factors"]

_HINT = "Convert with lower=None: PyTorch then runs the loop and differentiates twice."
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass
class GradientOwner:
    """Says whether the gradient of the sequence is a new tensor that nothing else reads.

    Args:
        is_new: set by the loop once a kernel has run it: its backward pass allocates the gradient.
    """

    is_new: bool = False


def takes_channel_factors(x_seq: Tensor, module: BatchNormBase) -> bool:
    """Whether `channel_factors` takes a sequence `[T, N, C, *]` and a BatchNorm."""
    if not (module.training or module.running_mean is None):
        return False
    dtype, batch = x_seq.dtype, x_seq.shape[0] * x_seq.shape[1]
    if dtype not in (torch.float32, torch.float64) or type(x_seq) not in _PLAIN or not x_seq.is_cpu or not batch:
        return False
    tensors = (module.weight, module.bias, module.running_mean, module.running_var)
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return False
        if tensor.shape != (x_seq.shape[2],):
            return False
    if x_seq.is_neg() or not _is_dense_batch(x_seq):
        return False
    return builds(SOURCES[x_seq.element_size()], "BatchNorm runs in PyTorch")


def channel_factors(
    x_seq: Tensor, module: BatchNormBase, owner: GradientOwner
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sequence, and mean, scale and bias of each channel; updates the running statistics as the module does.

    Args:
        x_seq: `[T, N, C, *]`.
        module: a BatchNorm that uses the statistics of all steps and samples.
        owner: tells the backward pass whether it may change the gradient of the sequence in place.

    Returns:
        The sequence, which the loop reads instead of `x_seq`, and three tensors that broadcast with a step.
    """
    batch = x_seq.detach().flatten(0, 1)
    module._check_input_dim(batch)
    check_batch_size(list(batch.shape))
    (factor,) = update_factors(module, 1)
    keeps = module.training and module.track_running_stats and module.running_mean is not None
    running = (module.running_mean, module.running_var) if keeps else None
    y_seq, *factors = _ChannelFactors.apply(x_seq, module.weight, module.bias, running, factor, module.eps, owner)
    shape = (-1, *(1,) * (x_seq.dim() - 3))
    mean, scale, bias = (value.view(shape) for value in factors)
    return y_seq, mean, scale, bias


def _is_dense_batch(x_seq: Tensor) -> bool:
    """Whether time folds into the batch without a copy, and the batch is row-major or channels-last."""
    T, N = x_seq.shape[:2]
    # The batch, not only a step: with one sample, any distance between the steps folds without a copy.
    return (T == 1 or N == 1 or x_seq.stride(0) == N * x_seq.stride(1)) and is_dense(x_seq.flatten(0, 1))


class _ChannelFactors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None,
        factor: float,
        eps: float,
        owner: GradientOwner,
    ) -> tuple[Tensor, ...]:
        factors = channel_statistics(x_seq.flatten(0, 1), weight, bias, running, factor, eps)
        ctx.save_for_backward(x_seq, factors)
        ctx.owner = owner
        ctx.set_materialize_grads(False)
        mean, scale, shift = factors[0], factors[1], factors[2]
        ctx.mark_non_differentiable(*([mean] if ctx.needs_input_grad[0] else [mean, x_seq]))
        return x_seq, mean, scale, shift

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, of_mean: None, of_scale: Tensor | None, of_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a BatchNorm inside a kernel", _HINT)
        x_seq, factors = ctx.saved_tensors
        if not _is_dense_batch(x_seq):  # a saved tensor hook returned it in another layout
            x_seq = x_seq.contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]

        def backward(grads: Any) -> list[Tensor | None]:
            of_x, of_scale, of_bias = grads
            of_scale, of_bias = (None if g is None else g.contiguous() for g in (of_scale, of_bias))
            of_x = _own(of_x, x_seq, ctx.owner.is_new) if needs_x else None
            batch = None if of_x is None else of_x.flatten(0, 1)
            x = x_seq.flatten(0, 1)
            of_weight = add_gradient_of_statistics(batch, x, factors, of_scale, of_bias, needs_weight)
            return [of_x, of_weight, of_bias if needs_bias else None]

        return *for_each_gradient(backward, (grad, of_scale, of_bias)), None, None, None, None


def _own(grad: Tensor | None, x_seq: Tensor, is_new: bool) -> Tensor:
    """The gradient of a sequence with constant statistics as a tensor that may be changed, in the layout of `x_seq`."""
    if grad is None:
        return torch.zeros_like(x_seq)
    if is_new and grad.dtype == x_seq.dtype and _strides(grad) == _strides(x_seq):
        return grad
    return torch.empty_like(x_seq).copy_(grad)


def _strides(x: Tensor) -> list[int]:
    """The strides of the dimensions along which an index can change."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
