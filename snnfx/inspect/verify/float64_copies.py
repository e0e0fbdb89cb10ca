"""Copy a model and its net in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import reset_net


def to_float64(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if x.is_floating_point() or x.is_complex() else x


def copies_in_float64(model: nn.Module, net: Any) -> tuple[nn.Module, Any]:
    """Deep copies of model and net in float64 that share the same modules as the originals."""
    with isolated(model, net):
        reset_net(model)
        reset_net(net)
        attributes = [_plain_attributes(module) for root in (model, net) for module in root.modules()]
        # deepcopy refuses tensors with a grad_fn.
        memo = {id(x): x.detach().clone() for x in pytree.tree_leaves(attributes) if _has_grad_fn(x)}
        model, net = copy.deepcopy((model, net), memo)
    for root in (model, net):
        root.double()
        for module in root.modules():
            for key, value in _plain_attributes(module).items():
                # `double` converts parameters and buffers only: convert initial states, constants and masks as well.
                if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                    module.__dict__[key] = pytree.tree_map_only(Tensor, to_float64, value)
    return model, net


def _has_grad_fn(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_leaf


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
