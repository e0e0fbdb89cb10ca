"""Summarise a layer or operation in a few characters: `Conv2d` with `1→64 3x3 pad 1`, `mean` with `(0)`."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.ir.nodes import is_size
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.run_loop import run_loop
from snnfx.ops.step_functions import FunctionHolder, apply_autograd_function
from snnfx.sandbox.torch_internals import (
    AdaptiveAvgPoolBase,
    AdaptiveMaxPoolBase,
    AvgPoolBase,
    ConvBase,
    DropoutBase,
    MaxPoolBase,
    NormBase,
)
from snnfx.state.step_calls import call_opaque

__all__ = ["summarize_module", "summarize_node"]

_NEURON_ATTRIBUTES = (
    ("tau", "tau"),
    ("alpha", "alpha"),
    ("beta", "beta"),
    ("v_threshold", "threshold"),
    ("v_th", "threshold"),
    ("threshold", "threshold"),
)


def summarize_node(program: StepProgram, node: Node) -> tuple[str, str]:
    """The type of a node and its hyperparameters: `("Conv2d", "1→64 3x3")`, `("mean", "(0)")`."""
    module = program.module_of(node)
    if module is not None:
        detail = summarize_module(module)
        if node.target is call_opaque:
            detail = f"{detail} (opaque)".strip()
        return type(module).__name__, detail
    if node.target is apply_autograd_function and isinstance(node.args[0], Node):
        holder = program.resolve(str(node.args[0].target))
        if isinstance(holder, FunctionHolder):
            return holder.function.__name__, "autograd.Function"
    if node.target is run_loop:
        return "loop over time", _loop(program, node)
    name = operation_name(node)
    if name == "getitem" and len(node.args) == 2:
        return f"[{_index(node.args[1])}]", ""
    return name, _arguments(node)


def _loop(program: StepProgram, node: Node) -> str:
    """The iterations and states of a loop of a whole call: `T iterations, state sn.mem`."""
    handle, steps, *_ = node.args
    slots = program.resolve(str(handle.target)).net.program.slots  # type: ignore[union-attr]
    iterations = "T" if isinstance(steps, Node) else str(steps)
    states = ", ".join(slot.name for slot in slots)
    return f"{iterations} iterations" + (f", state {states}" if states else "")


def summarize_module(module: nn.Module) -> str:
    """The main hyperparameters of a layer in short form; "" for a layer without any."""
    if isinstance(module, ConvBase):
        return _convolution(module)
    if isinstance(module, MaxPoolBase | AvgPoolBase):
        return _pooling(module)
    if isinstance(module, AdaptiveAvgPoolBase | AdaptiveMaxPoolBase):
        return f"to {_sizes(module.output_size)}"
    if isinstance(module, NormBase):
        return str(module.num_features)
    if isinstance(module, DropoutBase):
        return f"p={module.p:g}"
    if isinstance(module, nn.Upsample):
        scale = module.scale_factor
        return f"x{_sizes(scale)} {module.mode}" if scale is not None else f"to {_sizes(module.size)} {module.mode}"
    for kind, names, form in _BY_CLASS:
        if isinstance(module, kind):
            return form.format(*(_sizes(getattr(module, name)) for name in names))
    return _neuron(module)


_BY_CLASS: tuple[tuple[type[nn.Module], tuple[str, ...], str], ...] = (
    (nn.Bilinear, ("in1_features", "in2_features", "out_features"), "{},{}→{}"),
    (nn.Linear, ("in_features", "out_features"), "{}→{}"),
    (nn.Embedding, ("num_embeddings", "embedding_dim"), "{}→{}"),
    (nn.GroupNorm, ("num_groups", "num_channels"), "{} groups of {}"),
    (nn.LayerNorm, ("normalized_shape",), "{}"),
    (nn.RNNCellBase, ("input_size", "hidden_size"), "{}→{}"),
    (nn.RNNBase, ("input_size", "hidden_size"), "{}→{}"),
    (nn.MultiheadAttention, ("embed_dim", "num_heads"), "{} heads {}"),
    (nn.Softmax, ("dim",), "dim {}"),
    (nn.LogSoftmax, ("dim",), "dim {}"),
    (nn.LeakyReLU, ("negative_slope",), "{}"),
    (nn.PixelShuffle, ("upscale_factor",), "x{}"),
)


def _convolution(layer: ConvBase) -> str:
    parts = [f"{layer.in_channels}→{layer.out_channels}", _kernel(layer.kernel_size)]
    if not _is_all(layer.stride, 1):
        parts.append(f"s{_sizes(layer.stride)}")
    if isinstance(layer.padding, str) or not _is_all(layer.padding, 0):
        parts.append(f"pad {_sizes(layer.padding)}")
    if not _is_all(layer.dilation, 1):
        parts.append(f"dil {_sizes(layer.dilation)}")
    if layer.groups != 1:
        parts.append(f"groups {layer.groups}")
    return " ".join(parts)


def _pooling(layer: Any) -> str:
    dims = int(type(layer).__name__[-2]) if type(layer).__name__[-2:-1].isdigit() else 2
    kernel = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * dims
    parts = [_kernel(kernel)]
    stride = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,) * dims
    if stride != kernel:
        parts.append(f"s{_sizes(stride)}")
    if not _is_all(layer.padding, 0):
        parts.append(f"pad {_sizes(layer.padding)}")
    return " ".join(parts)


def _kernel(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes)


def _sizes(value: Any) -> str:
    """A size, one number or one for each dimension; equal numbers are written once."""
    if isinstance(value, tuple | list):
        return _sizes(value[0]) if len(set(value)) == 1 and len(value) > 1 else ",".join(map(_sizes, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_all(value: Any, number: int) -> bool:
    return all(v == number for v in value) if isinstance(value, tuple | list) else bool(value == number)


def _neuron(module: nn.Module) -> str:
    """The constants of a neuron that are single numbers under one of the usual names."""
    parts = []
    for attribute, symbol in _NEURON_ATTRIBUTES:
        value = _number(getattr(module, attribute, None))
        if value is not None and not (symbol == "threshold" and value == 1.0):
            parts.append(f"{symbol}={value:g}")
    return " ".join(parts)


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        plain = type(value) is Tensor and value.numel() == 1 and value.device.type == "cpu"
        return float(f"{value.item():.3g}") if plain else None
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return None


def _arguments(node: Node) -> str:
    """The non-tensor arguments of a call: `(1)`, `(dim=1)`; computed sizes are written `…`."""
    given = [_argument(a) for a in (node.args[1:] if node.op == "call_method" else node.args)]
    # torch's functions are recorded with all their defaults, which are left out.
    named = {key: _argument(value) for key, value in node.kwargs.items() if not _is_usual(key, value)}
    texts = [text for text in given if text is not None]
    texts += [f"{key}={text}" for key, text in named.items() if text is not None]
    return f"({', '.join(texts)})" if texts else ""


def _is_usual(key: str, value: Any) -> bool:
    return value is None or value is False or (key, value) in (("padding", 0), ("dilation", 1))


def _argument(value: Any) -> str | None:
    """The text of an argument; None for tensors."""
    if isinstance(value, Node):
        return "…" if is_size(value) else None
    if isinstance(value, tuple | list):
        texts = [_argument(v) for v in value]
        if not texts or any(text is None for text in texts):
            return None
        return f"[{', '.join(str(text) for text in texts)}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return repr(value) if isinstance(value, int | str | bool) or value is None else "…"


def _index(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_index(v) for v in value)
    if isinstance(value, slice):
        parts = ["" if part is None else _index(part) for part in (value.start, value.stop)]
        return ":".join(parts if value.step is None else [*parts, _index(value.step)])
    if value is Ellipsis:
        return "..."
    return (_argument(value) or "x") if not isinstance(value, Node) or is_size(value) else "x"
