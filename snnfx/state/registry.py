"""State as a value: the `Stateful` protocol, and the registry of how modules of each kind are stepped.

A stateful module is stepped by a pure function `step(state, *inputs) -> (outputs, state)`. Modules that keep their
state in attributes, as people write them, are made pure by swapping the attributes in and out around one call.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from snnfx.errors import CaptureError
from snnfx.sandbox.contents_snapshot import MISSING, ContentsSnapshot, attributes_of
from snnfx.sandbox.user_code import location_of_forward

__all__ = [
    "Adapter",
    "MemoryAdapter",
    "Stateful",
    "StatefulCall",
    "StatelessAdapter",
    "adapter_of",
    "call_opaque",
    "call_stateful",
    "composite_adapter",
    "copy_initial_value",
    "detach_net",
    "has_forward_hooks",
    "initial_value",
    "is_stateful_tree",
    "named_stateful",
    "opaque_initial_value",
    "register_adapter",
    "reset_net",
    "takes_state",
]

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


def copy_initial_value(initial: Any) -> Any:
    """An initial value that a step may change in place."""
    return initial.clone() if isinstance(initial, Tensor) else copy.copy(initial)


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


class CompositeAdapter(MemoryAdapter):
    """The state of a module and everything inside it, for a module that is run as it is (an opaque leaf)."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [(f"{name}." if name else "", part, adapter) for name, part, adapter in named_stateful(module)]

    def elementwise(self, module: nn.Module) -> bool:
        return False

    def is_leaf(self, module: nn.Module) -> bool:
        return True

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(prefix + name for prefix, part, adapter in self.parts for name in adapter.names(part))

    def read(self, module: nn.Module) -> State:
        return tuple(value for _, part, adapter in self.parts for value in adapter.read(part))

    def write(self, module: nn.Module, state: Sequence[Any]) -> None:
        start = 0
        for _, part, adapter in self.parts:
            count = len(adapter.names(part))
            adapter.write(part, state[start : start + count])
            start += count

    def reset(self, module: nn.Module) -> None:
        for _, part, adapter in self.parts:
            adapter.reset(part)

    def initial(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> State:
        before = self.read(module)
        try:
            self.reset(module)
            return self.read(module)
        finally:
            self.write(module, before)

    def step(self, module: nn.Module, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        with _attributes_unchanged(module):
            return step_by_swapping(self, module, state, *inputs, **kwargs)


def composite_adapter(module: nn.Module) -> CompositeAdapter:
    """The adapter of an opaque module: the states of all registered modules in it."""
    return CompositeAdapter(module)


def is_stateful_tree(module: nn.Module, adapter: Adapter | None) -> bool:
    """A stateful leaf with stateful modules inside it: stepped as a whole, with the states of all of them."""
    if adapter is None or not adapter.is_leaf(module):
        return False
    parts = ((part, adapter_of(part)) for part in module.modules() if part is not module)
    return any(inner is not None and inner.names(part) for part, inner in parts)


@contextlib.contextmanager
def _attributes_unchanged(module: nn.Module) -> Iterator[None]:
    """Refuse a module that keeps state where nobody declared it: its results would leak into the next call."""
    before = {m: ContentsSnapshot(attributes_of(m)) for m in module.modules()}
    yield
    for m, held in before.items():
        now = attributes_of(m)
        changes = [c for key in {**held.values, **now} for c in held.changes(key, now.get(key, MISSING))]
        # What it draws from a generator of its own is drawn anew in each step.
        changed = [".".join(str(key) for key in c.path) for c in changes if c.kind != "random"]
        if changed:
            for name in now.keys() - held.values.keys():
                del m.__dict__[name]
            m.__dict__.update(held.values)
            held.restore()
            raise CaptureError(
                "SNNFX213",
                f"`{type(m).__name__}` changes its attribute `{changed[0]}` in a step",
                where=location_of_forward(m),
                why="the module could not be traced, and a state that is not registered cannot be handed on.",
                hint=f'Derive it from snnfx.MemoryModule and call self.register_memory("{changed[0]}", initial).',
            )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks, so that it has to be called as a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


_adapters: dict[type, Adapter] = {}
_adapter_of_class: dict[type, Adapter | None] = {}
_THIRD_PARTY = ("spikingjelly", "snntorch", "norse")
"""Packages with an adapter module of the same name in `snnfx.state.adapters`, imported when a module of theirs is
met."""


def register_adapter(cls: type, adapter: Adapter) -> None:
    """Teach snnfx how to step `cls` and its subclasses."""
    _adapters[cls] = adapter
    _adapter_of_class.clear()


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the nearest registered base class of a module, or None for a module without known state."""
    module_class = type(module)
    if module_class not in _adapter_of_class:
        _adapter_of_class[module_class] = _find_adapter(module_class)
    return _adapter_of_class[module_class]


def _find_adapter(module_class: type) -> Adapter | None:
    for cls in module_class.__mro__:
        package = cls.__module__.partition(".")[0]
        if package in _THIRD_PARTY and f"snnfx.state.adapters.{package}" not in sys.modules:
            importlib.import_module(f"snnfx.state.adapters.{package}")
        if cls in _adapters:
            return _adapters[cls]
    return None


def named_stateful(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """`(qualified name, module, adapter)` of each stateful module of a model, each module once."""
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.names(module):
            yield name, module, adapter


def call_stateful(module: nn.Module, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
    """One pure step of a registered module: `(outputs, next state)`. The node of a stateful leaf in a step graph."""
    adapter = adapter_of(module)
    assert adapter is not None, f"{type(module).__name__} has no adapter"
    return adapter.step(module, state, *inputs, **kwargs)


def initial_value(module: nn.Module, index: int, *inputs: Any, **kwargs: Any) -> Any:
    """The value of slot number `index` of a registered module before the first step, given that step's inputs."""
    adapter = adapter_of(module)
    assert adapter is not None, f"{type(module).__name__} has no adapter"
    return adapter.initial(module, *inputs, **kwargs)[index]


def call_opaque(module: nn.Module, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
    """One pure step of a module that could not be traced, with the states of everything in it."""
    return composite_adapter(module).step(module, state, *inputs, **kwargs)


def opaque_initial_value(module: nn.Module, index: int, *inputs: Any, **kwargs: Any) -> Any:
    """The value of slot number `index` of an opaque module before the first step."""
    return composite_adapter(module).initial(module, *inputs, **kwargs)[index]


for _runtime_function in (call_stateful, initial_value, call_opaque, opaque_initial_value):
    setattr(_runtime_function, "snnfx_calls_module", True)  # noqa: B010


def reset_net(model: nn.Module) -> None:
    """Give every state of a model, or the state carried by a converted net, its initial value.

    Args:
        model: any module; stateful modules of registered kinds are found among its submodules.
    """
    carried = getattr(model, "reset_carried_state", None)
    if callable(carried):
        carried()
    for _, module, adapter in named_stateful(model):
        adapter.reset(module)


def detach_net(model: nn.Module) -> None:
    """Cut the history of every state of a model, or of the state carried by a converted net (truncated BPTT)."""
    carried = getattr(model, "detach_carried_state", None)
    if callable(carried):
        carried()
    for _, module, adapter in named_stateful(model):
        adapter.write(module, [v.detach() if isinstance(v, Tensor) else v for v in adapter.read(module)])


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Take the forward hooks off a model and its submodules for a while."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    taken = [(m, name, m.__dict__[name]) for m in model.modules() for name in names if m.__dict__.get(name)]
    for module, name, _ in taken:
        module.__dict__[name] = OrderedDict()
    try:
        yield
    finally:
        for module, name, hooks in taken:
            module.__dict__[name] = hooks
