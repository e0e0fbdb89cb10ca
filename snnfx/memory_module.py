"""`MemoryModule`: base class of user-defined stateful modules."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.state.memory_adapter import MemoryAdapter, copy_initial_value
from snnfx.state.registry import register_adapter

__all__ = ["MemoryModule"]


class MemoryModule(nn.Module):
    """Base class of user-defined stateful modules.

    Register each state with its initial value, then read and assign `self.<name>` in `forward`, which computes one time
    step. The initial value is a number (it stands for a tensor with the shape of the state), a tensor, or None
    (`forward` creates the state at the first step).

    Example:
        >>> import torch, snnfx
        >>> class Leaky(snnfx.MemoryModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_memory("v", 0.0)
        ...     def forward(self, x):
        ...         self.v = 0.5 * self.v + x
        ...         return self.v
        >>> cell = Leaky()
        >>> [float(cell(torch.ones(1))) for _ in range(3)]
        [1.0, 1.5, 1.75]
        >>> cell.reset(); float(cell(torch.ones(1)))
        1.0
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # First: the constructor of a torch layer behind this class assigns attributes.
        self.__dict__["_memories"] = {}
        self.__dict__["_initial_memories"] = {}
        super().__init__(*args, **kwargs)

    def register_memory(self, name: str, initial: Any) -> None:
        """Register the state `self.<name>` with its initial value.

        Args:
            name: a valid, unused attribute name.
            initial: a number, a tensor, or None.

        Raises:
            InputError: SNNFX309, the name is not a valid attribute name or is already used.
        """
        if not name.isidentifier():
            raise InputError(
                "SNNFX309",
                f"cannot register the memory `{name}`",
                where=type(self).__name__,
                why="the name is not a valid attribute name.",
                hint="Choose a Python identifier.",
            )
        if hasattr(self, name):
            raise InputError(
                "SNNFX309",
                f"cannot register the memory `{name}`",
                where=type(self).__name__,
                why="the module already has an attribute with this name.",
                hint="Choose another name.",
            )
        self._initial_memories[name] = initial
        self._memories[name] = copy_initial_value(initial)

    def memory_names(self) -> tuple[str, ...]:
        """The names of the registered states, in order of registration."""
        return tuple(self._memories)

    def reset(self) -> None:
        """Reset every state to its initial value."""
        for name, initial in self._initial_memories.items():
            self._memories[name] = copy_initial_value(initial)

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories")
        if memories is not None and name in memories:
            return memories[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        memories = self.__dict__.get("_memories")
        if memories is not None and name in memories:
            memories[name] = value
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryModule:
        # After a step with gradients, states have a grad_fn, which deepcopy refuses.
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        for key, value in self.__dict__.items():
            if key == "_memories":
                value = {name: _detached(memory) for name, memory in value.items()}
            clone.__dict__[key] = copy.deepcopy(value, memo)
        return clone


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and not value.is_leaf else value


register_adapter(MemoryModule, MemoryAdapter())
