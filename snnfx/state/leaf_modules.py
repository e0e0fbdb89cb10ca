"""Which modules stay one node of the step graph: torch.nn's own layers and what is vouched for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["declare_leaf", "has_torch_forward", "is_declared_leaf", "is_leaf"]

_vouched: dict[type, Callable[[nn.Module], bool]] = {}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def declare_leaf(cls: type, when: Callable[[nn.Module], bool] = lambda module: True) -> None:
    """Declare that `cls` computes in one step what the torch.nn class it derives from computes.

    Args:
        cls: a subclass of a torch.nn layer with its own `forward`, or a stateless elementwise module.
        when: whether it holds for a given instance (for instance: not in multi-step mode).
    """
    _vouched[cls] = when


def is_declared_leaf(module: nn.Module) -> bool:
    """Whether somebody vouched for the module's own class, as it is configured."""
    when = _vouched.get(type(module))
    return when is not None and when(module)


def has_torch_forward(module: nn.Module) -> bool:
    """Whether a module of a class of torch.nn has torch's own forward, or somebody vouched for its own."""
    return is_declared_leaf(module) or (type(module).forward.__module__ or "").startswith("torch.nn.")


def is_leaf(module: nn.Module) -> bool:
    """Whether capture keeps a stateless module as one call."""
    if is_declared_leaf(module) or getattr(type(module), "snnfx_elementwise", False):
        return True
    if isinstance(module, _CONTAINERS):
        return False
    # A subclass with a forward of its own may do anything: it is traced through.
    return (type(module).forward.__module__ or "").startswith("torch.nn.")
