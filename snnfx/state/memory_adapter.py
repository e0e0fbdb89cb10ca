"""Step a module that stores its state in attributes, such as a `MemoryModule`, as a pure function."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from snnfx.state.hooks import has_forward_hooks
from snnfx.state.stateful import Adapter, State, Stateful

__all__ = ["MemoryAdapter", "copy_initial_value", "step_by_swapping"]


class MemoryAdapter:
    """Steps any `MemoryModule` by swapping its memories in and out; uses the pure protocol where it is there."""

    def elementwise(self, module: nn.Module) -> bool:
        return bool(getattr(module, "elementwise", False))

    def is_leaf(self, module: nn.Module) -> bool:
        # Neurons of the zoo stay whole; the forward that a user wrote is traced, so that only its cycle is looped.
        return _is_pure(type(module))

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

    def initial(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> State:
        if isinstance(module, Stateful):
            return module.initial_state(*inputs, **kwargs)
        return tuple(copy_initial_value(value) for value in module._initial_memories.values())  # type: ignore[operator]

    def step(self, module: nn.Module, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        if _is_pure(type(module)) and not has_forward_hooks(module):
            return module.step(state, *inputs, **kwargs)  # type: ignore[operator, no-any-return]
        return step_by_swapping(self, module, state, *inputs, **kwargs)


_pure_classes: dict[type, bool] = {}
"""Plain dicts as caches, here and below: torch.compile warns about functools.cache."""


def _is_pure(module_class: type) -> bool:
    """Whether a class gives its step as a pure function, and overrides neither `forward` nor it further down."""
    if module_class not in _pure_classes:
        methods = ("state_names", "initial_state", "step")
        nearest = next(cls for cls in module_class.__mro__ if "forward" in vars(cls) or "step" in vars(cls))
        is_whole = all(callable(getattr(module_class, name, None)) for name in methods)
        _pure_classes[module_class] = is_whole and "step" in vars(nearest)
    return _pure_classes[module_class]


def step_by_swapping(
    adapter: Adapter, module: nn.Module, state: State, *inputs: Any, **kwargs: Any
) -> tuple[Any, State]:
    """One pure step of a module that keeps its state in attributes: write, call, read, put back."""
    before = adapter.read(module)
    try:
        adapter.write(module, state)
        outputs = module(*inputs, **kwargs)
        return outputs, adapter.read(module)
    finally:
        adapter.write(module, before)


def copy_initial_value(initial: Any) -> Any:
    """An initial value that a step may change in place."""
    return initial.clone() if isinstance(initial, Tensor) else copy.copy(initial)
