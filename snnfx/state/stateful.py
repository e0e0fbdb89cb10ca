"""Protocols for modules with explicit state: `Stateful` modules and the adapters of all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

__all__ = ["Adapter", "State", "Stateful", "StatefulCall", "StatelessAdapter", "takes_state"]

State = tuple[Any, ...]
"""The values of a module's slots, in the order of their names."""


@runtime_checkable
class Stateful(Protocol):
    """What a module has to offer to be stepped with explicit state. Both methods are pure.

    `state_names` gives the slots in order; `initial_state(*inputs)` the state before the first step, given the
    inputs of that step (shapes, dtype, device; a Python scalar stands for a tensor of the shape of the slot's next
    value); `step(state, *inputs)` returns `(outputs, next_state)` and changes nothing.
    """

    def state_names(self) -> tuple[str, ...]: ...

    def initial_state(self, *inputs: Any, **kwargs: Any) -> State: ...

    def step(self, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]: ...


class Adapter(Protocol):
    """How snnfx reads, writes and steps the state of one family of modules.

    `elementwise` says that the outputs and the state have the shape of the first input and that every element is
    computed on its own: neurons. `is_leaf` says whether a call stays one node, or is traced through with its states as
    slots. `refuse` raises when the module, as it is configured, cannot be stepped.
    """

    def elementwise(self, module: nn.Module) -> bool: ...

    def is_leaf(self, module: nn.Module) -> bool: ...

    def refuse(self, module: nn.Module, where: str) -> None: ...

    def names(self, module: nn.Module) -> tuple[str, ...]: ...

    def read(self, module: nn.Module) -> State: ...

    def write(self, module: nn.Module, state: Sequence[Any]) -> None: ...

    def reset(self, module: nn.Module) -> None: ...

    def initial(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> State: ...

    def step(self, module: nn.Module, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]: ...


@dataclass(frozen=True)
class StatefulCall:
    """How a module is called that takes and returns its state, e.g. `spk, mem = lif(x, mem)`.

    Args:
        state: the state that the call passes, flat, None for what starts from the reset state; None: the call passes
            no state, and the module uses the one that it keeps.
        inputs: the other arguments.
        kwargs: the other arguments by name.
        returns: `(output, next state values) -> what the call returns`.
    """

    state: tuple[Any, ...] | None
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    returns: Callable[[Any, tuple[Any, ...]], Any]


def takes_state(adapter: Adapter | None) -> bool:
    """Whether modules of this family may be given their state as arguments.

    Their adapter then has `read_call(module, args, kwargs, starts_as_none) -> StatefulCall`, where `starts_as_none`
    says that this is the first step of a model whose own state argument is None, so that a None may stand for a state
    that is handed on later; and its `step` takes None for a state that starts from the reset value.
    """
    return callable(getattr(adapter, "read_call", None))


class StatelessAdapter:
    """The part of an adapter that is about slots, for modules that have none of their own."""

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return ()

    def read(self, module: nn.Module) -> State:
        return ()

    def write(self, module: nn.Module, state: Sequence[Any]) -> None:
        return None

    def reset(self, module: nn.Module) -> None:
        return None

    def initial(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> State:
        return ()
