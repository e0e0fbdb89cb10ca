"""Copy a model and its net in float64, and run code that names float32 in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import backward_passes_in, pytree
from snnfx.sandbox.user_code import format_location, user_location
from snnfx.state.registry import reset_net

__all__ = ["CastsToFloat64", "copies_in_float64", "in_float64", "to_float64"]

_WIDER: dict[Any, Any] = {
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
    "torch.FloatTensor": "torch.DoubleTensor",
}


_BACKWARD_PASSES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


def to_float64(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if x.is_floating_point() or x.is_complex() else x


def copies_in_float64(model: nn.Module, net: Any) -> tuple[nn.Module, Any]:
    """Copies of model and net in float64 that share the same modules as the originals, in the reset state.

    Locks, files and other objects that cannot be copied are shared with the originals.
    """
    with isolated(model, net):
        reset_net(model)
        reset_net(net)
        memo: dict[int, Any] = {}

        def tensor(x: Tensor) -> Tensor:
            if id(x) not in memo:
                memo[id(x)] = _tensor_in_float64(x)
            copied: Tensor = memo[id(x)]
            return copied

        copies = StructuralCopy(tensor=tensor)
        copied = copies.of(model)
        copies.of(getattr(net, "source", None))
        memo |= {id(original): clone for original, clone in copies.pairs()}
        attributes = [_plain_attributes(module) for module in net.modules()]
        # deepcopy refuses tensors with a grad_fn.
        memo |= {id(x): tensor(x) for x in pytree.tree_leaves(attributes) if isinstance(x, Tensor) and not x.is_leaf}
        net = copy.deepcopy(net, memo)
    net.double()
    if hasattr(net, "first_attributes"):
        net.__dict__["first_attributes"] = net.first_attributes.mapped(to_float64)
    for module in net.modules():
        for key, value in _plain_attributes(module).items():
            # `double` converts parameters and buffers only: convert initial states, constants and masks as well.
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                module.__dict__[key] = pytree.tree_map_only(Tensor, to_float64, value)
    return copied, net


def _tensor_in_float64(x: Tensor) -> Tensor:
    if x.is_meta:
        return x
    value = to_float64(x.detach()).clone()
    if isinstance(x, nn.Parameter):
        return nn.Parameter(value, requires_grad=x.requires_grad)
    return value.requires_grad_(x.requires_grad and x.is_leaf)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}


class CastsToFloat64(TorchFunctionMode):
    """Casts to float64 wherever code casts to float32: `.float()`, `.to(torch.float32)`, `dtype=torch.float32`.

    Attributes:
        lines: the lines of user code that cast to float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _BACKWARD_PASSES:
            with backward_passes_in(self):
                return func(*args, **kwargs)
        if func is torch.Tensor.float:
            self._note()
            return torch.Tensor.double(*args, **kwargs)
        if any(_is_narrow(a) for a in (*args, *kwargs.values())):
            self._note()
            args = tuple(_WIDER[a] if _is_narrow(a) else a for a in args)
            kwargs = {key: _WIDER[a] if _is_narrow(a) else a for key, a in kwargs.items()}
        return func(*args, **kwargs)

    def _note(self) -> None:
        where = format_location(user_location())
        if where:
            self.lines[where] = None


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype | str) and value in _WIDER


@contextmanager
def in_float64() -> Iterator[CastsToFloat64]:
    """Run code in float64: casts to float32 and new tensors of the default dtype become float64."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with CastsToFloat64() as casts:
            yield casts
    finally:
        torch.set_default_dtype(default)
