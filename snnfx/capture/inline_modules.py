"""Modules outside the model whose forward is traced where they are called, such as `nn.ReLU()(x)`."""

from __future__ import annotations

from torch import nn

from snnfx.state.leaf_modules import has_torch_forward
from snnfx.state.registry import adapter_of

__all__ = ["is_traced_inline"]


def is_traced_inline(module: nn.Module) -> bool:
    """Whether a module computes only from its input and its settings: a layer of torch without parameters and hooks."""
    for part in module.modules():
        is_container = isinstance(part, nn.Sequential) and has_torch_forward(part)
        has_hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        if part._parameters or part._buffers or has_hooks or "forward" in vars(part):
            return False
        if adapter_of(part) is not None or not (is_container or has_torch_forward(part)):
            return False
    return True
