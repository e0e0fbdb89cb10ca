"""Refuse a model whose states and parameters cannot be compared by name with those of the net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.inspect.verify.runs import Runs
from snnfx.inspect.verify.sequence_inputs import SequenceInputs
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import adapter_of

__all__ = ["check_has_values", "check_matching_modules"]


def check_has_values(model: nn.Module, inputs: Any) -> None:
    """Raise if a parameter, a buffer or an input is on the meta device, so that it has a shape but no values.

    Raises:
        InputError: SNNFX417.
    """
    named = {
        **{f"`{name}`": tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())},
        "an input": next((x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.is_meta), None),
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.is_meta:
            raise InputError(
                "SNNFX417",
                f"verify compares values, and {name} is on the meta device",
                why="tensors on the meta device have a shape but no values.",
                hint="Create model and inputs on a device with memory and convert that model, or give the model "
                'memory with model.to_empty(device="cpu") and load its weights.',
            )


def check_matching_modules(model: nn.Module, net: Any, inputs: SequenceInputs, first: dict[str, Any]) -> None:
    """Raise if the steps use parameters, buffers or states of a module that only one of model and net has.

    Modules that no step calls, and modules without anything to compare by name, may differ.

    Raises:
        InputError: SNNFX413.
    """
    source = getattr(net, "source", None)
    if not isinstance(source, nn.Module) or source is model:
        return
    own, others = dict(model.named_modules()), dict(source.named_modules())
    for owner, only in ((source, others.keys() - own.keys()), (model, own.keys() - others.keys())):
        modules = dict(owner.named_modules())
        compared = {name: modules[name] for name in sorted(only) if _has_contents(modules[name])}
        called = _called(owner, compared, net, inputs, first)
        if not called:
            continue
        name = called[0]
        has, has_not = ("net", "model") if owner is source else ("model", "net")
        raise InputError(
            "SNNFX413",
            "the net is not a net of this model",
            why=f"the steps use a module `{name}` ({type(compared[name]).__name__}) that the {has} has and the "
            f"{has_not} does not. The net was converted from a {type(source).__name__}; the model is a "
            f"{type(model).__name__}.",
            hint="Pass the model that was converted: verify(net.source, net, x_seq).",
        )


def _has_contents(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(own) or adapter_of(module) is not None


def _called(
    owner: nn.Module, modules: dict[str, nn.Module], net: Any, inputs: SequenceInputs, first: dict[str, Any]
) -> list[str]:
    """The names of those modules that the steps of a model call."""
    if not modules:
        return []
    called: dict[str, None] = {}
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: called.setdefault(name)) for n, m in modules.items()]
    try:
        runs = Runs(owner, net, inputs, first, gradients=False, one_call=True)
        with runs.isolated(), torch.no_grad():
            runs.reset_model()
            runs.step_model(inputs.first_step().fresh())
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)
