"""Fold BatchNorm into the weights of the layer before it: one pass over the sequence instead of two.

In evaluation `norm(layer(x))` equals `layer(x)` with other weights: each output channel is scaled by `weight /
sqrt(running_var + eps)` and shifted by a constant of the means and biases. The weights are folded in float64, rounded
once, and cached while the tensors they were computed from have the same contents. Each call compares these tensors byte
by byte: version counters miss the writes of a BatchNorm in training, of fused optimizers and through `.data`.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018, section 3.2.
"""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from snnfx.sandbox.torch_internals import (
    are_transforms_active,
    current_backward_pass,
    dispatch_mode_count,
    forward_mode_level,
    has_global_hooks,
    is_forward_mode_enabled,
    tracing_state,
)
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.leaf_modules import call_leaf

__all__ = ["NORMS_AFTER", "call_layer", "call_norm"]

Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]
"""Weight and bias of a layer; weight, bias, running mean and variance of the norm."""

NORMS_AFTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}
"""Layer class -> class of the BatchNorm that can be folded into it. Subclasses are excluded."""

_TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}

_ASSUMED_SAMPLES = 4
"""The assumed least number of samples (times steps) in a call of a convolution."""

_compare = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).memcmp
_compare.argtypes, _compare.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int


def call_layer(
    layer: Any,
    norm: Any,
    x: Tensor,
    call: Callable[[Any, Tensor], Tensor] | None = None,
    call_folded: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor | None] | None = None,
) -> tuple[Tensor, bool]:
    """Call a layer, with the BatchNorm after it folded into its weights where that is equal up to rounding.

    The norm is not folded with gradients enabled or inside an autograd function (which may recompute the call); under
    torch.compile, torch.export, torch.func, forward-mode AD, dispatch modes, hooks or autocast; for a norm in training;
    for dtypes other than float32 and float64; on devices other than the CPU; or if the weights are too large for
    folding to pay.

    Args:
        layer: one of the classes in `NORMS_AFTER`.
        norm: the BatchNorm after it.
        x: the input of the layer.
        call: another way to compute `layer(x)`.
        call_folded: another way to call the layer with a given weight and bias; it may return None.

    Returns:
        `(norm(layer(x)), True)` if the norm was folded, else `(layer(x), False)`.
    """
    if not torch.compiler.is_compiling() and _is_inference() and type(x) is Tensor and x.is_cpu:
        tensors = _tensors_of(layer, norm)
        if tensors is not None and _can_be_folded(layer, x, tensors) and _are_plain_calls(layer, norm):
            folded = _folded(layer, norm, tensors, _takes_images(layer, x))
            if folded.weight is not None:
                y = None if call_folded is None else call_folded(layer, x, folded.weight, folded.bias)
                return _call_with(layer, x, folded.weight, folded.bias) if y is None else y, True
    return call_leaf(layer, x) if call is None else call(layer, x), False


def call_norm(norm: nn.Module, called: tuple[Tensor, bool]) -> Tensor:
    """Apply the norm to the result of `call_layer`, unless it was folded."""
    y, is_normalized = called
    return y if is_normalized else call_leaf(norm, y)


def _is_inference() -> bool:
    """Whether no gradients are recorded, now or by the recomputation of an enclosing autograd function."""
    if torch.is_grad_enabled() or current_backward_pass() != -1:
        return False
    return is_forward_mode_enabled() or torch.is_inference_mode_enabled()


def _tensors_of(layer: nn.Module, norm: nn.Module) -> Tensors | None:
    """The tensors of both modules; None if their parameters and buffers are not those of their classes."""
    of_layer, of_norm, buffers = layer._parameters, norm._parameters, norm._buffers
    try:
        weight, mean, variance = of_layer["weight"], buffers["running_mean"], buffers["running_var"]
        if weight is None or mean is None or variance is None:
            return None
        return weight, of_layer["bias"], of_norm["weight"], of_norm["bias"], mean, variance
    except KeyError:
        return None


def _can_be_folded(layer: Any, x: Tensor, tensors: Tensors) -> bool:
    """Whether folding pays and all tensors are plain strided CPU tensors of one dtype."""
    weight, dtype = tensors[0], x.dtype
    if dtype not in (torch.float32, torch.float64) or x.dim() != weight.dim() or not _pays(layer, x, weight):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer) or tensor.dtype != dtype or not tensor.is_cpu:
            return False
        if tensor.layout is not torch.strided:
            return False
    return True


def _pays(layer: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether comparing the weights is cheaper than a pass over the output: the output has as many elements.

    For a convolution this does not depend on T and N, so that a chunked sequence gives the same result.
    """
    if isinstance(layer, nn.Linear):
        elements = x.shape[0] * layer.out_features
    else:
        positions, stride = math.prod(x.shape[2:]), math.prod(layer.stride)
        positions = positions * stride if layer.transposed else positions // stride
        elements = _ASSUMED_SAMPLES * positions * layer.out_channels
    return bool(elements >= weight.numel())


def _are_plain_calls(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether a call of both modules has no hooks, overrides, modes or transforms."""
    return not (
        norm.training
        or type(norm) is not NORMS_AFTER.get(type(layer))
        or has_forward_hooks(layer)
        or has_forward_hooks(norm)
        or "forward" in layer.__dict__
        or "forward" in norm.__dict__
        or has_global_hooks()
        or dispatch_mode_count()
        or are_transforms_active()
        or forward_mode_level() >= 0
        or tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


@dataclass(frozen=True)
class _Folded:
    """The folded weights of a layer and a norm, with copies of their sources.

    Args:
        weight, bias: the folded tensors; None if folding is not possible.
        sources: copies of the original tensors.
        eps: of the norm.
        channels_last: the memory format of the weight.
    """

    weight: Tensor | None
    bias: Tensor | None
    sources: tuple[Tensor | None, ...]
    eps: float
    channels_last: bool

    def holds_for(self, tensors: Tensors, eps: float, channels_last: bool) -> bool:
        same_settings = eps == self.eps and channels_last == self.channels_last
        return same_settings and all(map(_is_same, tensors, self.sources))


_cache: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, _Folded]]
_cache = weakref.WeakKeyDictionary()
"""norm -> layer -> folded weights. Not stored in the modules, so that it is not pickled or copied."""


def _folded(layer: Any, norm: Any, tensors: Tensors, channels_last: bool) -> _Folded:
    of_norm = _cache.get(norm)
    if of_norm is None:
        of_norm = _cache[norm] = weakref.WeakKeyDictionary()
    found = of_norm.get(layer)
    if found is None or not found.holds_for(tensors, norm.eps, channels_last):
        with torch.inference_mode(False), torch.no_grad():
            sources = tuple(None if t is None else t.detach().clone() for t in tensors)
            found = _Folded(*_fold(layer, tensors, sources, norm.eps, channels_last), sources, norm.eps, channels_last)
        of_norm[layer] = found
    return found


def _takes_images(layer: nn.Module, x: Tensor) -> bool:
    """Whether a convolution takes channels-last images, for which oneDNN reads channels-last weights faster."""
    return type(layer) is nn.Conv2d and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _fold(
    layer: Any, tensors: Tensors, sources: tuple[Tensor | None, ...], eps: float, channels_last: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The folded weight and bias; None if they would be inexact or changes of the sources undetectable."""
    weight, bias, gamma, beta, mean, variance = (None if t is None else t.detach().double() for t in tensors)
    assert weight is not None and mean is not None and variance is not None
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # A byte-wise comparison is valid only for tensors that fill their memory; their copies keep the strides.
    pairs = zip(tensors, sources, strict=True)
    fills_memory = all(t.stride() == s.stride() for t, s in pairs if t is not None and s is not None)
    if not fills_memory or any(t is not None and t.shape != (channels,) for t in (bias, gamma, beta, mean, variance)):
        return None, None
    scale = torch.rsqrt(variance + eps)
    scale = scale if gamma is None else scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    shift = shift if beta is None else shift + beta
    folded, shift = _scale_outputs(layer, weight, scale).to(tensors[0]), shift.to(tensors[0])
    if not (torch.isfinite(folded).all() and torch.isfinite(shift).all()):
        return None, None
    return folded.contiguous(memory_format=torch.channels_last) if channels_last else folded, shift


def _scale_outputs(layer: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """Scale the output channels of the weight, which are in dim 1 of each group for transposed convolutions."""
    ones = (1,) * (weight.dim() - 2)
    if type(layer) not in _TRANSPOSED:
        return weight * scale.view(-1, 1, *ones)
    by_group: Tensor = weight.unflatten(0, (layer.groups, -1)) * scale.view(layer.groups, 1, -1, *ones)
    return by_group.flatten(0, 1)


def _is_same(tensor: Tensor | None, copy: Tensor | None) -> bool:
    """Whether a tensor equals its copy, byte by byte."""
    if tensor is None or copy is None:
        return tensor is copy
    if tensor.dtype != copy.dtype or tensor.shape != copy.shape or tensor.stride() != copy.stride():
        return False
    return not _compare(tensor.data_ptr(), copy.data_ptr(), tensor.nbytes)


def _call_with(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Call a layer with the given weight and bias."""
    transposed = _TRANSPOSED.get(type(layer))
    if transposed is not None:
        settings = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        return transposed(x, weight, bias, *settings)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)  # type: ignore[no-any-return]
