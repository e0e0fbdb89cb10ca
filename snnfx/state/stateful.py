"""Protocols for modules with explicit state: `Stateful` modules and the adapters of all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

__all__ = ["Adapter", "State", "Stateful", "StatefulCall", "StatelessAdapter", "multi_step_form", "takes_state"]

State = tuple[Any, ...]
"""The values of a module's slots, in the order of `state_names`."""


@runtime_checkable
class Stateful(Protocol):
    """Protocol of a module that is stepped with explicit state. Its methods are pure.

    - `state_names` returns the names of the slots, in order.
    - `initial_state(*inputs)` returns the state before the first step, given the inputs of that step (their shapes,
      dtype and device). A Python scalar stands for a tensor with the shape of the slot's next value.
    - `step(state, *inputs)` returns `(outputs, next_state)` and has no side effects.
    """

    def state_names(self) -> tuple[str, ...]: ...

    def initial_state(self, /, *inputs: Any, **kwargs: Any) -> State: ...

    def step(self, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]: ...


class Adapter(Protocol):
    """Reads, writes and steps the state of one family of modules.

    - `elementwise`: whether outputs and state have the shape of the first input and each element is computed
      independently, as in neurons.
    - `is_leaf`: whether a call is recorded as one node; otherwise the forward is traced, with its states as slots.
    - `refuse`: raises if the module cannot be stepped in its current configuration.
    - `multi_step_form` (optional): for a module whose calls take sequences, time first: "steps" if such a call runs
      `step` at each time step, "trace" if capture must trace its forward. None for all other modules.
    """

    def elementwise(self, module: nn.Module) -> bool: ...

    def is_leaf(self, module: nn.Module) -> bool: ...

    def refuse(self, module: nn.Module, where: str) -> None: ...

    def names(self, module: nn.Module) -> tuple[str, ...]: ...

    def read(self, module: nn.Module) -> State: ...

    def write(self, module: nn.Module, state: Sequence[Any]) -> None: ...

    def reset(self, module: nn.Module) -> None: ...

    def initial(self, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> State: ...

    def step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]: ...


@dataclass(frozen=True)
class StatefulCall:
    """One call of a module that takes and returns its state, e.g. `spk, mem = lif(x, mem)`.

    Args:
        state: the flat state that the call passes, with None for each value that starts from the reset state. None if
            the call passes no state, so the module uses its stored state.
        inputs: the other positional arguments.
        kwargs: the other keyword arguments.
        returns: builds the return value of the call from `(output, next state values)`.
    """

    state: tuple[Any, ...] | None
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    returns: Callable[[Any, tuple[Any, ...]], Any]


def takes_state(adapter: Adapter | None) -> bool:
    """Whether modules of this family accept their state as arguments.

    Such an adapter has `read_call(module, args, kwargs, starts_as_none) -> StatefulCall`. `starts_as_none` is True in
    the first step of a model whose own state argument is None; a None may then stand for a state that later steps
    pass. The `step` of the adapter accepts None for a state that starts from the reset value.
    """
    return callable(getattr(adapter, "read_call", None))


def multi_step_form(adapter: Adapter | None, module: nn.Module) -> str | None:
    """How capture records a call of a module on sequences: "steps" or "trace"; None if its calls take one step."""
    form = getattr(adapter, "multi_step_form", None)
    return None if form is None else form(module)


class StatelessAdapter:
    """Base class of adapters for modules that store no state."""

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return ()

    def read(self, module: nn.Module) -> State:
        return ()

    def write(self, module: nn.Module, state: Sequence[Any]) -> None:
        return None

    def reset(self, module: nn.Module) -> None:
        return None

    def initial(self, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> State:
        return ()
