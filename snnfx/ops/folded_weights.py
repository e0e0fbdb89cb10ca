"""A layer that computes the BatchNorm after it with its weights, one pass over the sequence instead of two.

In evaluation `norm(layer(x))` is `layer(x)` with other weights: each output channel times `weight / sqrt(running_var +
eps)`, shifted by what the means and biases make of it. They are folded in float64, rounded once and kept as long as
what they were made of has the same contents. That is looked at in each call, byte by byte: the version counter of a
tensor does not tell of what a BatchNorm in training, a fused optimizer or anything through `.data` writes.

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
"""Layers that can compute a BatchNorm after them, with its class. A subclass may do something else."""

_TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}

_STEPS = 4
"""Samples, steps included, that a call of a convolution is taken to have at least."""

_compare = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).memcmp
_compare.argtypes, _compare.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int


def call_layer(layer: Any, norm: Any, x: Tensor) -> tuple[Tensor, bool]:
    """`(norm(layer(x)), True)`, by one call of the layer, where that is the same up to rounding; `(layer(x), False)`.

    The layer is called as it is unless this is inference (`torch.no_grad()`, not within an autograd function that may
    compute it again); while somebody watches or transforms the operations (torch.compile, torch.export, torch.func,
    forward-mode AD, dispatch modes, hooks); under autocast; when the norm is in training; for dtypes but float32 and
    float64; off the CPU; and where its weights are too many for it to pay.

    Args:
        layer: one of the classes in `NORMS_AFTER`.
        norm: the BatchNorm after it.
        x: what the layer takes.
    """
    if not torch.compiler.is_compiling() and _is_inference() and type(x) is Tensor and x.is_cpu:
        tensors = _tensors_of(layer, norm)
        if tensors is not None and _can_be_folded(layer, x, tensors) and _are_plain_calls(layer, norm):
            folded = _folded(layer, norm, tensors, _takes_images(layer, x))
            if folded.weight is not None:
                return _call_with(layer, x, folded.weight, folded.bias), True
    return layer(x), False


def call_norm(norm: nn.Module, called: tuple[Tensor, bool]) -> Tensor:
    """The norm after a layer that was called by `call_layer`."""
    y, is_normalized = called
    return y if is_normalized else norm(y)


def _is_inference() -> bool:
    """Whether nobody differentiates: not even a function of autograd, which may run this again with a history."""
    if torch.is_grad_enabled() or current_backward_pass() != -1:
        return False
    return is_forward_mode_enabled() or torch.is_inference_mode_enabled()


def _tensors_of(layer: nn.Module, norm: nn.Module) -> Tensors | None:
    """The tensors of both modules; None where they are not the parameters and buffers that their classes have."""
    of_layer, of_norm, buffers = layer._parameters, norm._parameters, norm._buffers
    try:
        weight, mean, variance = of_layer["weight"], buffers["running_mean"], buffers["running_var"]
        if weight is None or mean is None or variance is None:
            return None
        return weight, of_layer["bias"], of_norm["weight"], of_norm["bias"], mean, variance
    except KeyError:
        return None


def _can_be_folded(layer: Any, x: Tensor, tensors: Tensors) -> bool:
    """Whether it pays, and the tensors are ordinary ones of one dtype."""
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
    """Whether looking at the weights takes less than a pass over the output: it has at least as many elements.

    For a convolution this does not depend on T and N: a sequence in chunks gives what the whole of it does.
    """
    if isinstance(layer, nn.Linear):
        elements = x.shape[0] * layer.out_features
    else:
        positions, stride = math.prod(x.shape[2:]), math.prod(layer.stride)
        positions = positions * stride if layer.transposed else positions // stride
        elements = _STEPS * positions * layer.out_channels
    return bool(elements >= weight.numel())


def _are_plain_calls(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether calling the modules does what their classes say, and nobody watches what is computed."""
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


# -- weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folded:
    """The weights of a layer and a norm together, and what they were made of.

    Args:
        weight, bias: None where there are none that do the same.
        sources: copies of the tensors.
        eps: of the norm.
        channels_last: the format of the weight.
    """

    weight: Tensor | None
    bias: Tensor | None
    sources: tuple[Tensor | None, ...]
    eps: float
    channels_last: bool

    def holds_for(self, tensors: Tensors, eps: float, channels_last: bool) -> bool:
        same_settings = eps == self.eps and channels_last == self.channels_last
        return same_settings and all(map(_is_same, tensors, self.sources))


_kept: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, _Folded]]
_kept = weakref.WeakKeyDictionary()
"""By norm and layer. Not in the modules: it is nothing to pickle or to copy."""


def _folded(layer: Any, norm: Any, tensors: Tensors, channels_last: bool) -> _Folded:
    of_norm = _kept.get(norm)
    if of_norm is None:
        of_norm = _kept[norm] = weakref.WeakKeyDictionary()
    found = of_norm.get(layer)
    if found is None or not found.holds_for(tensors, norm.eps, channels_last):
        with torch.inference_mode(False), torch.no_grad():
            sources = tuple(None if t is None else t.detach().clone() for t in tensors)
            found = _Folded(*_fold(layer, tensors, sources, norm.eps, channels_last), sources, norm.eps, channels_last)
        of_norm[layer] = found
    return found


def _takes_images(layer: nn.Module, x: Tensor) -> bool:
    """Whether a convolution takes images that are channels-last: oneDNN reads weights of that format faster then."""
    return type(layer) is nn.Conv2d and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _fold(
    layer: Any, tensors: Tensors, sources: tuple[Tensor | None, ...], eps: float, channels_last: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer and the norm after it; None where they would not be the same, or not be noticed."""
    weight, bias, gamma, beta, mean, variance = (None if t is None else t.detach().double() for t in tensors)
    assert weight is not None and mean is not None and variance is not None
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # A copy keeps the strides of a tensor that fills its memory; of others the bytes say nothing.
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
    """The weights with each output channel scaled; a transposed convolution has them in dim 1, group by group."""
    ones = (1,) * (weight.dim() - 2)
    if type(layer) not in _TRANSPOSED:
        return weight * scale.view(-1, 1, *ones)
    by_group: Tensor = weight.unflatten(0, (layer.groups, -1)) * scale.view(layer.groups, 1, -1, *ones)
    return by_group.flatten(0, 1)


def _is_same(tensor: Tensor | None, copy: Tensor | None) -> bool:
    """Whether a tensor has the contents of a copy that was made of it, byte by byte."""
    if tensor is None or copy is None:
        return tensor is copy
    if tensor.dtype != copy.dtype or tensor.shape != copy.shape or tensor.stride() != copy.stride():
        return False
    return not _compare(tensor.data_ptr(), copy.data_ptr(), tensor.nbytes)


def _call_with(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Call a layer with other weights."""
    transposed = _TRANSPOSED.get(type(layer))
    if transposed is not None:
        settings = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        return transposed(x, weight, bias, *settings)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)  # type: ignore[no-any-return]
