"""Step an opaque module with the states of all modules inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from snnfx.errors import CaptureError
from snnfx.sandbox.contents_snapshot import MISSING, ContentsSnapshot, attributes_of
from snnfx.sandbox.user_code import location_of_forward
from snnfx.state.memory_adapter import MemoryAdapter, step_by_swapping
from snnfx.state.registry import adapter_of, named_stateful, storage_of
from snnfx.state.stateful import Adapter, State
from snnfx.state.step_locks import stepped_by_one_thread

__all__ = ["CompositeAdapter", "composite_adapter", "is_stateful_tree"]


class CompositeAdapter(MemoryAdapter):
    """Steps an opaque module, with the states of the module and of all modules inside it."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [(f"{name}." if name else "", part, adapter) for name, part, adapter in named_stateful(module)]
        self._stateful_modules = [part for _, part, _ in self.parts]

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

    def initial(self, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> State:
        with stepped_by_one_thread(module, *self._stateful_modules):
            before = self.read(module)
            try:
                self.reset(module)
                return self.read(module)
            finally:
                self.write(module, before)

    def step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        with stepped_by_one_thread(module, *self._stateful_modules), _refusing_unregistered_state(module):
            step_call = getattr(adapter_of(module), "step_call", None)
            call = None if step_call is None else step_call(module)
            return step_by_swapping(self, module, state, *inputs, call=call, **kwargs)


def composite_adapter(module: nn.Module) -> CompositeAdapter:
    """The adapter of an opaque module, with the states of all registered modules inside it."""
    return CompositeAdapter(module)


def is_stateful_tree(module: nn.Module, adapter: Adapter | None) -> bool:
    """Whether a module is a stateful leaf with stateful modules inside, so that it is stepped as a whole."""
    if adapter is None or not adapter.is_leaf(module):
        return False
    submodules = ((part, adapter_of(part)) for part in module.modules() if part is not module)
    return any(inner is not None and inner.names(part) for part, inner in submodules)


@contextlib.contextmanager
def _refusing_unregistered_state(module: nn.Module) -> Iterator[None]:
    """Refuse a module that changes unregistered attributes: their values would leak into the next call."""
    storage = storage_of(module)

    def attributes(m: nn.Module) -> dict[str, Any]:
        return {key: value for key, value in attributes_of(m).items() if (m, key) not in storage}

    before = {m: ContentsSnapshot(attributes(m)) for m in module.modules()}
    yield
    for m, snapshot in before.items():
        now = attributes(m)
        changes = [c for key in {**snapshot.values, **now} for c in snapshot.changes(key, now.get(key, MISSING))]
        # The module may use its own random generator: each step draws new numbers.
        changed = [c for c in changes if c.kind != "random"]
        if changed:
            for name in now.keys() - snapshot.values.keys():
                del m.__dict__[name]
            m.__dict__.update(snapshot.values)
            snapshot.restore()
            name = ".".join(str(key) for key in changed[0].path)
            hint = f'Derive it from snnfx.MemoryModule and call self.register_memory("{name}", initial).'
            if len(changed[0].path) > 1 or isinstance(changed[0].new, list | dict | set | str):
                hint = (
                    "Return the value and store it after the call of the net. For a log of a number, write `x.item()` "
                    "instead of `float(x)`, so that the module is traced."
                )
            if isinstance(changed[0].new, PackedSequence):
                hint = "Store the padded tensor in a registered memory: torch.nn.utils.rnn.pad_packed_sequence(x)[0]."
            raise CaptureError(
                "SNNFX213",
                f"a step of `{type(m).__name__}` changes its attribute `{name}`",
                where=location_of_forward(m),
                why="the module cannot be traced, so a net carries only its registered states across steps. (Code that "
                "reads shapes is traced with example_inputs.)",
                hint=hint,
            )
