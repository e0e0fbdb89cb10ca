"""Leaf modules: stateless modules that remain one node of the step graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["call_leaf", "declare_leaf", "has_torch_forward", "is_declared_leaf", "is_leaf", "takes_sequence"]

_declared_leaves: dict[type, Callable[[nn.Module], bool]] = {}
_takes_sequence: dict[type, Callable[[nn.Module], bool]] = {}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def declare_leaf(
    cls: type,
    when: Callable[[nn.Module], bool] = lambda module: True,
    takes_sequence: Callable[[nn.Module], bool] | None = None,
) -> None:
    """Declare that one step of `cls` computes the same as its torch.nn base class.

    Args:
        cls: a subclass of a torch.nn layer with its own `forward`, or a stateless element-wise module.
        when: predicate on an instance: whether the declaration applies.
        takes_sequence: predicate on an instance: whether its calls take sequences, time first, and fold time into the
            batch. Capture then records a call on folded values.
    """
    _declared_leaves[cls] = when
    if takes_sequence is not None:
        _takes_sequence[cls] = takes_sequence


def takes_sequence(module: nn.Module) -> bool:
    """Whether the calls of a declared leaf take sequences, time first."""
    takes = _takes_sequence.get(module.__class__)
    return takes is not None and takes(module)


def call_leaf(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Call a leaf on one step; a leaf that takes sequences gets one of length 1."""
    if module.__class__ not in _takes_sequence or not takes_sequence(module):
        return module(*args, **kwargs)
    return module(*(x.unsqueeze(0) for x in args), **kwargs).squeeze(0)


def is_declared_leaf(module: nn.Module) -> bool:
    """Whether `declare_leaf` was called for the class of the module and applies to its configuration."""
    when = _declared_leaves.get(module.__class__)
    return when is not None and when(module)


def has_torch_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of torch.nn, or a class declared equivalent by `declare_leaf`."""
    return is_declared_leaf(module) or _inherits_forward_of_layer(module)


def is_leaf(module: nn.Module) -> bool:
    """Whether capture records a stateless module as one call."""
    if "forward" in vars(module):  # a function that replaces the forward of the class
        return False
    if is_declared_leaf(module) or getattr(type(module), "snnfx_elementwise", False):
        return True
    if isinstance(module, _CONTAINERS):
        return False
    # A subclass with its own forward is traced, because its computation is unknown.
    return _inherits_forward_of_layer(module) and not _calls_code_of_user(module)


def _inherits_forward_of_layer(module: nn.Module) -> bool:
    """Whether the forward of a module is that of a layer of torch; a class with other methods only has none."""
    forward = type(module).forward
    return forward is not nn.Module.forward and (forward.__module__ or "").startswith("torch.nn.")


def _calls_code_of_user(module: nn.Module) -> bool:
    """Whether a layer of torch has a submodule with code of the user, as `nn.DataParallel` has."""
    return any(
        not is_leaf(child) and (not isinstance(child, _CONTAINERS) or _calls_code_of_user(child))
        for name, child in module._modules.items()
        if child is not None and name != "parametrizations"  # it computes weights, not values of the step
    )
