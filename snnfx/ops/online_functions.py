"""Functions that online rules insert into a step graph: detached states, traces, traced weight ops.

A traced weight op returns `op(operand)`. Its gradient with respect to the operand does not change; its gradient with
respect to the weight is the gradient of `op(trace)`. A product or convolution computes the latter from the trace and
the incoming gradient, without evaluating `op(trace)`.

A trace has the shape of the operand or, if each neuron has a leak of its own, one more dimension with a trace for each
output channel: `[N, *, out, in]` for a linear layer, `[N, out, in / groups, *]` for a convolution. The gradient of the
weights of an output channel then uses the trace of this channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnfx.ops.step_functions import ValueAndGradients
from snnfx.sandbox.torch_internals import ConvBase, is_batched_by_vmap
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.leaf_modules import call_leaf

__all__ = [
    "cut_history",
    "draw_dropout_mask",
    "ones_per_sample",
    "probe_leak",
    "traced_call",
    "traced_module",
    "update_trace",
]

_HALF = (torch.float16, torch.bfloat16)


def cut_history(value: Any) -> Any:
    """Detach a state from the autograd graph; a state may start as a number."""
    return value.detach() if isinstance(value, Tensor) else value


def update_trace(trace: Any, operand: Tensor, leak: Any) -> Tensor:
    """`leak * trace + operand`, without gradients, in float32 or wider.

    Args:
        trace: `[N, *]`, or the number 0 before the first step.
        operand: `[N, *]`.
        leak: a number, or a tensor that broadcasts with the operand to the shape of the trace.
    """
    with torch.no_grad():
        operand = operand.detach()
        operand = operand.float() if operand.dtype in _HALF else operand
        if isinstance(leak, Tensor):
            leak = leak.to(operand)
            if isinstance(trace, Tensor):
                return torch.addcmul(operand, trace, leak)
            return (operand + leak * trace).expand(torch.broadcast_shapes(operand.shape, leak.shape))  # type: ignore[no-any-return]
        if isinstance(trace, Tensor):
            return torch.add(operand, trace, alpha=leak)
        return operand + leak * trace if trace else operand


def ones_per_sample(operand: Tensor) -> Tensor:
    """The operand of a bias: 1 for each sample, `[N]`."""
    return operand.new_ones(operand.shape[0])


def probe_leak(probe: Callable[..., Any], *constants: Any) -> Any:
    """The current leak of a neuron, a number or a tensor with the leak of each; see `snnfx.analysis.leak`."""
    return probe(*constants)


def draw_dropout_mask(how: Any, operand: Tensor, name: str) -> Tensor:
    """Draw a dropout mask with elements 0 or `1 / (1 - p)`.

    Args:
        how: the probability, or the dropout module.
        operand: `[N, *]`.
        name: name of the function in `torch.nn.functional`.
    """
    p = how.p if isinstance(how, nn.Module) else how
    with torch.no_grad():
        return getattr(F, name)(torch.ones_like(operand), p, True)  # type: ignore[no-any-return]


def traced_module(module: nn.Module, operand: Tensor, trace: Tensor, bias_trace: Tensor | None = None) -> Tensor:
    """Call a weight module on its operand, with the weight gradient taken on a trace.

    Args:
        module: a linear or convolutional layer, or any module whose parameter gradients use the trace.
        operand: `[N, *]`.
        trace: of the shape of the operand.
        bias_trace: `[N]`; None: no trace for the bias.
    """
    if not torch.is_grad_enabled():
        return call_leaf(module, operand)  # type: ignore[no-any-return]
    if not has_forward_hooks(module) and not _is_mapped(operand):
        if type(module).forward is nn.Linear.forward:
            return _TracedLinear.apply(operand, trace, module.weight, module.bias, bias_trace)  # type: ignore[no-any-return]
        if isinstance(module, ConvBase) and _has_torch_forward(module):
            return _traced_convolution_module(module, operand, trace, bias_trace)
    return _with_gradients_on_trace(module, operand, trace)


def traced_call(name: str, position: int, trace: Tensor, bias_trace: Any, /, *args: Any, **kwargs: Any) -> Tensor:
    """Call a weight function by name, with the weight gradient taken on a trace.

    Args:
        name: name of the function in `torch.nn.functional` or `torch`.
        position: index of the operand among the positional arguments.
        trace: of the shape of the operand.
        bias_trace: `[N]`; None: no trace for the bias.
    """
    function = getattr(F, name, None) or getattr(torch, name)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)  # type: ignore[no-any-return]
    if _is_mapped(args[position]) or (trace.dim() > args[position].dim() and name in ("matmul", "mm")):
        return _call_with_gradients_on_trace(function, position, trace, *args, **kwargs)
    if name == "linear":
        operand, weight, bias = _linear_arguments(*args, **kwargs)
        return _TracedLinear.apply(operand, trace, weight, bias, bias_trace)  # type: ignore[no-any-return]
    if name in ("matmul", "mm") and position == 0 and args[1].dim() == 2 and args[0].dim() > 1:
        return _TracedLinear.apply(args[0], trace, args[1].t(), None, None)  # type: ignore[no-any-return]
    if name.startswith("conv"):
        return _traced_convolution_function(name, trace, bias_trace, *args, **kwargs)
    return _call_with_gradients_on_trace(function, position, trace, *args, **kwargs)


def _call_with_gradients_on_trace(
    function: Callable[..., Tensor], position: int, trace: Tensor, /, *args: Any, **kwargs: Any
) -> Tensor:
    fixed = tuple(a.detach() if isinstance(a, Tensor) and i != position else a for i, a in enumerate(args))
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    def on(operand: Tensor) -> Tensor:
        return function(*(operand if i == position else a for i, a in enumerate(args)), **kwargs)

    value = function(*fixed, **detached)
    return ValueAndGradients.apply(value, _on_trace(on, args[position], trace))  # type: ignore[no-any-return]


def _on_trace(function: Callable[[Tensor], Tensor], operand: Tensor, trace: Tensor) -> Tensor:
    """A weight op evaluated on a trace; with a trace for each output channel, on each of them (slow)."""
    trace = trace.to(operand.dtype)
    if trace.dim() == operand.dim():
        return function(trace)
    is_linear = operand.shape[-1] == trace.shape[-1] and operand.shape[1:-1] == trace.shape[1:-2]
    if is_linear:
        trace = trace.movedim(-2, 1)
    y = function(trace.flatten(0, 1)).unflatten(0, trace.shape[:2])
    of_channel: Tensor = y.diagonal(dim1=1, dim2=-1 if is_linear else 2)
    return of_channel if is_linear else of_channel.movedim(-1, 1)


def _is_mapped(x: Tensor) -> bool:
    """Whether a tensor is batched by torch.vmap."""
    return is_batched_by_vmap(x)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _has_torch_forward(module: nn.Module) -> bool:
    return (type(module).forward.__module__ or "").startswith("torch.nn.") and (
        getattr(type(module), "_conv_forward", nn.Conv2d._conv_forward).__module__.startswith("torch.nn.")
    )


def _with_gradients_on_trace(module: nn.Module, operand: Tensor, trace: Tensor) -> Tensor:
    """The general form: a second forward pass on the trace provides the gradients of the parameters."""
    fixed = {name: p.detach() for name, p in module.named_parameters()}
    value = torch.func.functional_call(module, fixed, (operand,))
    return ValueAndGradients.apply(value, _on_trace(module, operand, trace))  # type: ignore[no-any-return]


class _TracedLinear(torch.autograd.Function):
    """`y = x W^T + b`, with `dW = g^T a` for the trace a of x."""

    # No setup_context: torch then binds arguments at each call, which costs more than a small layer.

    @staticmethod
    def forward(
        ctx: Any, operand: Tensor, trace: Tensor, weight: Tensor, bias: Tensor | None, bias_trace: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(trace, weight, bias_trace)
        ctx.operand_dtype, ctx.bias_dtype = operand.dtype, None if bias is None else bias.dtype
        return F.linear(operand, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trace, weight, bias_trace = ctx.saved_tensors
        grad_operand = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_operand = (grad @ weight.to(grad.dtype)).to(ctx.operand_dtype)
        if ctx.needs_input_grad[2]:
            if trace.dim() > grad.dim():
                flat, given = grad.reshape(-1, grad.shape[-1]), trace.reshape(-1, *trace.shape[-2:])
                grad_weight = torch.einsum("no,noi->oi", flat, given.to(grad.dtype)).to(weight.dtype)
            else:
                flat, given = grad.reshape(-1, grad.shape[-1]), trace.reshape(-1, trace.shape[-1])
                grad_weight = (flat.t() @ given.to(grad.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            weighted = grad if bias_trace is None else grad * _along_batch(bias_trace, grad, -1)
            grad_bias = weighted.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_operand, None, grad_weight, grad_bias, None


def _along_batch(trace: Tensor, like: Tensor, channel: int) -> Tensor:
    """The trace of a bias, `[N]` or `[N, out]`, in the dimensions of the output of the weight op."""
    shape = [1] * like.dim()
    shape[0] = trace.shape[0]
    if trace.dim() > 1:
        shape[channel] = trace.shape[1]
    return trace.to(like.dtype).view(shape)


def _gradients_on_trace(
    grad: Tensor, trace: Tensor, weight: Tensor, geometry: tuple[Any, ...], output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution with respect to its operand and, on the trace, its weight."""
    gradients = torch.ops.aten.convolution_backward(grad, trace, weight, None, *geometry, output_mask)
    return gradients[0], gradients[1]


def _gradients_per_channel(
    grad: Tensor, trace: Tensor, weight: Tensor, geometry: tuple[Any, ...], output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The same for a trace `[N, out, in / groups, *]`: its output channels form a convolution with `out` groups."""
    *settings, transposed, output_padding, groups = geometry
    out, given = trace.shape[1:3]
    grad_operand = grad_weight = None
    if output_mask[0]:
        operand = grad.new_empty(()).expand(grad.shape[0], given * groups, *trace.shape[3:])  # gives the shape only
        mask = [True, False, False]
        grad_operand = torch.ops.aten.convolution_backward(grad, operand, weight, None, *geometry, mask)[0]
    if output_mask[1]:
        kernel = weight.shape[2:]
        separate = weight.new_empty((out * given, 1, *kernel) if transposed else (out, given, *kernel))
        arguments = (*settings, transposed, output_padding, out, [False, True, False])
        grad_weight = torch.ops.aten.convolution_backward(grad, trace.flatten(1, 2), separate, None, *arguments)[1]
        if transposed:  # [groups, out / groups, in / groups, *] -> [groups, in / groups, out / groups, *]
            grad_weight = grad_weight.view(groups, out // groups, given, *kernel).transpose(1, 2).reshape(weight.shape)
    return grad_operand, grad_weight


class _TracedConvolution(torch.autograd.Function):
    """A convolution whose weight gradient is taken on a trace; one call of torch computes both gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        operand: Tensor,
        trace: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bias_trace: Tensor | None,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(trace, weight, bias_trace)
        ctx.geometry, ctx.operand_dtype = geometry, operand.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return torch.convolution(operand, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        trace, weight, bias_trace = ctx.saved_tensors
        output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], False]
        grad_operand = grad_weight = grad_bias = None
        if any(output_mask):
            of_trace = _gradients_per_channel if trace.dim() > grad.dim() else _gradients_on_trace
            grad_operand, grad_weight = of_trace(
                grad, trace.to(grad.dtype), weight.to(grad.dtype), ctx.geometry, output_mask
            )
        if ctx.needs_input_grad[3]:
            weighted = grad if bias_trace is None else grad * _along_batch(bias_trace, grad, 1)
            grad_bias = weighted.sum([0, *range(2, grad.dim())]).to(ctx.bias_dtype)
        return (
            None if grad_operand is None else grad_operand.to(ctx.operand_dtype),
            None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias,
            None,
            None,
        )


def _convolve(
    operand: Tensor, trace: Tensor, weight: Tensor, bias: Tensor | None, bias_trace: Tensor | None, *geometry: Any
) -> Tensor:
    if torch.is_autocast_enabled(operand.device.type):
        dtype = torch.get_autocast_dtype(operand.device.type)
        operand, weight, bias = operand.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _TracedConvolution.apply(operand, trace, weight, bias, bias_trace, geometry)  # type: ignore[no-any-return]


def _traced_convolution_module(module: ConvBase, operand: Tensor, trace: Tensor, bias_trace: Tensor | None) -> Tensor:
    dims = len(module.kernel_size)
    padding = module.padding
    unbatched = operand.dim() == dims + 1
    if unbatched or (module.transposed and bias_trace is not None and operand.dim() != dims + 2):
        return _with_gradients_on_trace(module, operand, trace)
    if module.padding_mode != "zeros":
        pads = module._reversed_padding_repeated_twice
        channels = trace.shape[1:-dims]
        operand, trace = (F.pad(x, pads, mode=module.padding_mode) for x in (operand, trace.flatten(1, -dims - 1)))
        trace = trace.unflatten(1, channels)
        padding = (0,) * dims
    elif isinstance(padding, str):
        operand, trace, padding = _padded(operand, trace, padding, module.kernel_size, module.dilation)
    return _convolve(
        operand,
        trace,
        module.weight,
        module.bias,
        bias_trace,
        list(module.stride),
        list(padding),
        list(module.dilation),
        module.transposed,
        list(module.output_padding),
        module.groups,
    )


def _padded(
    operand: Tensor, trace: Tensor, padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Numeric padding for "same" or "valid"; an odd total is padded explicitly, as in torch."""
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        return F.pad(operand, pads), F.pad(trace, pads), (0,) * len(kernel)
    return operand, trace, tuple(t // 2 for t in total)


def _traced_convolution_function(
    name: str, trace: Tensor, bias_trace: Tensor | None, /, *args: Any, **kwargs: Any
) -> Tensor:
    dims = int(name[-2])
    names: tuple[str, ...]
    if "transpose" in name:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    else:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    operand, weight, bias = given["input"], given["weight"], given.get("bias")

    def each(value: Any) -> list[int]:
        return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))

    dilation, padding = each(given.get("dilation", 1)), given.get("padding", 0)
    if isinstance(padding, str):
        operand, trace, padding = _padded(operand, trace, padding, weight.shape[2:], tuple(dilation))
    if operand.dim() == dims + 1:  # one sample without a batch
        return _convolve(
            operand.unsqueeze(0),
            trace.unsqueeze(0),
            weight,
            bias,
            None,
            each(given.get("stride", 1)),
            each(padding),
            dilation,
            "transpose" in name,
            each(given.get("output_padding", 0)),
            given.get("groups", 1),
        ).squeeze(0)
    return _convolve(
        operand,
        trace,
        weight,
        bias,
        bias_trace,
        each(given.get("stride", 1)),
        each(padding),
        dilation,
        "transpose" in name,
        each(given.get("output_padding", 0)),
        given.get("groups", 1),
    )
