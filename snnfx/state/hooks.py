"""Forward hooks of modules: whether a module has any, and how to disable them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

__all__ = ["has_forward_hooks", "without_hooks"]


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, so that it must be called as a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Disable the forward and backward hooks of a model and its submodules inside the context."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    removed = [(m, name, m.__dict__[name]) for m in model.modules() for name in names if m.__dict__.get(name)]
    for module, name, _ in removed:
        module.__dict__[name] = OrderedDict()
    try:
        yield
    finally:
        for module, name, hooks in removed:
            module.__dict__[name] = hooks
