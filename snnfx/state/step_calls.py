"""The functions that a step graph calls for one pure step of a stateful module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from snnfx.sandbox.torch_internals import CheckpointAsPlainCall
from snnfx.state.composite_adapter import composite_adapter
from snnfx.state.registry import adapter_of
from snnfx.state.stateful import State

__all__ = ["call_opaque", "call_stateful", "initial_value", "opaque_initial_value"]


def call_stateful(module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
    """One pure step of a registered module: returns `(outputs, next state)`."""
    adapter = adapter_of(module)
    assert adapter is not None, f"{type(module).__name__} has no adapter"
    return adapter.step(module, state, *inputs, **kwargs)


def initial_value(module: nn.Module, index: int, /, *inputs: Any, **kwargs: Any) -> Any:
    """The initial value of slot number `index` of a registered module, given the inputs of the first step."""
    adapter = adapter_of(module)
    assert adapter is not None, f"{type(module).__name__} has no adapter"
    return adapter.initial(module, *inputs, **kwargs)[index]


def call_opaque(module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
    """One pure step of an opaque module, with the states of all modules inside it.

    Checkpoints inside the module only call their function: the backward pass would run it with later state.
    """
    if torch.compiler.is_compiling():
        return composite_adapter(module).step(module, state, *inputs, **kwargs)
    with CheckpointAsPlainCall():
        return composite_adapter(module).step(module, state, *inputs, **kwargs)


def opaque_initial_value(module: nn.Module, index: int, /, *inputs: Any, **kwargs: Any) -> Any:
    """The initial value of slot number `index` of an opaque module."""
    return composite_adapter(module).initial(module, *inputs, **kwargs)[index]


for _runtime_function in (call_stateful, initial_value, call_opaque, opaque_initial_value):
    setattr(_runtime_function, "snnfx_calls_module", True)  # noqa: B010
