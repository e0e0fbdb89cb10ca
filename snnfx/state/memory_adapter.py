"""Step a module that stores its state in attributes, such as a `MemoryModule`, as a pure function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from snnfx.state.hooks import has_forward_hooks
from snnfx.state.stateful import Adapter, State
from snnfx.state.step_locks import stepped_by_one_thread

__all__ = ["MemoryAdapter", "copy_initial_value", "step_by_swapping"]


class MemoryAdapter:
    """Steps a `MemoryModule`: by its `Stateful` protocol if it has one, else by swapping its memories."""

    storage: tuple[str, ...] = ("_memories", "_initial_memories")

    def elementwise(self, module: nn.Module) -> bool:
        return bool(getattr(module, "elementwise", False))

    def is_leaf(self, module: nn.Module) -> bool:
        # Neurons of snnfx.neuron stay one node; a forward of the user is traced, so that only its cycle runs in a loop.
        return _is_pure(module.__class__)

    def refuse(self, module: nn.Module, where: str) -> None:
        return None

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return module.memory_names()  # type: ignore[operator, no-any-return]

    def read(self, module: nn.Module) -> State:
        return tuple(module._memories.values())  # type: ignore[operator]

    def write(self, module: nn.Module, state: Sequence[Any]) -> None:
        for name, value in zip(self.names(module), state, strict=True):
            module._memories[name] = value  # type: ignore[index, operator]

    def reset(self, module: nn.Module) -> None:
        module.reset()  # type: ignore[operator]

    def initial(self, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> State:
        if _is_stateful(module.__class__):
            return module.initial_state(*inputs, **kwargs)  # type: ignore[operator, no-any-return]
        return tuple(copy_initial_value(value) for value in module._initial_memories.values())  # type: ignore[operator]

    def step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        if _is_pure(module.__class__) and not has_forward_hooks(module):
            return module.step(state, *inputs, **kwargs)  # type: ignore[operator, no-any-return]
        return step_by_swapping(self, module, state, *inputs, **kwargs)


_pure_classes: dict[type, bool] = {}
"""A dict as cache, because torch.compile warns about functools.cache."""

_stateful_classes: dict[type, bool] = {}


def _is_stateful(module_class: type) -> bool:
    """Whether a class has the methods of `Stateful`; `isinstance` looks them up at each call."""
    if module_class not in _stateful_classes:
        methods = ("state_names", "initial_state", "step")
        _stateful_classes[module_class] = all(callable(getattr(module_class, name, None)) for name in methods)
    return _stateful_classes[module_class]


def _is_pure(module_class: type) -> bool:
    """Whether a class implements `Stateful` and no subclass of the implementation overrides `forward`."""
    if module_class not in _pure_classes:
        nearest = next(cls for cls in module_class.__mro__ if "forward" in vars(cls) or "step" in vars(cls))
        _pure_classes[module_class] = _is_stateful(module_class) and "step" in vars(nearest)
    return _pure_classes[module_class]


def step_by_swapping(
    adapter: Adapter,
    module: nn.Module,
    state: State,
    /,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, State]:
    """One pure step of a module with state in attributes: write the state, call, read it, restore.

    Args:
        adapter: the adapter of the module.
        module, state, inputs, kwargs: the step.
        call: computes the step; None: the module itself.
    """
    with stepped_by_one_thread(module):
        before = adapter.read(module)
        try:
            adapter.write(module, state)
            outputs = (call or module)(*inputs, **kwargs)
            return outputs, adapter.read(module)
        finally:
            adapter.write(module, before)


def copy_initial_value(initial: Any) -> Any:
    """Copy an initial value, so that a step may change it in place."""
    return initial.clone() if isinstance(initial, Tensor) else copy.copy(initial)
