"""What a second run of a segment meets: the modules, random numbers and autocast of the first one.

State is a value, so nothing has to be put back; but a run also sees the mode and the settings of modules and their
buffers, of which it gets copies (running statistics move once), the generators of random numbers, and whether autocast
is on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.sandbox.isolation import RNGState, rng_state

__all__ = ["Autocast", "Modules", "parameters_of", "recompute_lock", "replay_rng"]

recompute_lock = threading.RLock()
"""Held while a segment runs: the second run puts other parameters into the modules, which no other thread may see."""


def parameters_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    return list({id(p): p for m in modules for p in m._parameters.values() if p is not None}.values())


@dataclass
class Modules:
    """The modules of a segment as they are when this is made."""

    modules: list[nn.Module]
    parameters: list[Tensor]

    def __post_init__(self) -> None:
        number = {id(p): i for i, p in enumerate(self.parameters)}
        self.places: list[tuple[Any, Any, int]] = [
            (m._parameters, key, number[id(p)])
            for m in self.modules
            for key, p in m._parameters.items()
            if p is not None
        ]
        for m in self.modules:
            if isinstance(m, nn.RNNBase):
                # It reads its parameters past its registry.
                weights = enumerate(m._flat_weights)
                self.places += [(m._flat_weights, i, number[id(p)]) for i, p in weights if id(p) in number]
        self.training = [m.training for m in self.modules]
        self.settings = [_settings_of(m) for m in self.modules]

    def buffers(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Copies of what a run may change: the buffers of modules in training, with their places."""
        changing = [m for m in self.modules if m.training]
        return [(m._buffers, key, b.clone()) for m in changing for key, b in m._buffers.items() if b is not None]

    @contextlib.contextmanager
    def again(
        self, parameters: Sequence[Tensor], buffers: Sequence[tuple[dict[str, Any], str, Tensor]]
    ) -> Iterator[None]:
        """Modules in their mode of then, with these parameters and with copies of these buffers."""
        undo: list[tuple[Any, Any, Any]] = []
        registry: Any
        recompute_lock.acquire()
        modes = [(m, m.training) for m in self.modules]
        try:
            for registry, key, index in self.places:
                undo.append((registry, key, registry[key]))
                registry[key] = parameters[index]
            for registry, key, value in buffers:
                undo.append((registry, key, registry[key]))
                registry[key] = value.clone()
            for module, training, settings in zip(self.modules, self.training, self.settings, strict=True):
                module.training = training
                for name, value in settings.items():
                    now = module.__dict__.get(name, value)
                    if now is not value and (type(now) is not type(value) or now != value):
                        undo.append((module.__dict__, name, now))
                        module.__dict__[name] = value
            yield
        finally:
            for registry, key, own in reversed(undo):
                registry[key] = own
            for module, training in modes:
                module.training = training
            recompute_lock.release()


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """Numbers and flags that a module keeps in its attributes: the leak of a neuron, the eps of a BatchNorm."""
    found = {name: value for name, value in module.__dict__.items() if type(value) in _PLAIN and name != "training"}
    for name, table in module.__dict__.items():
        # What states start at is such a table.
        if type(table) is dict and table and all(type(value) in _PLAIN for value in table.values()):
            found[name] = dict(table)
    return found


_PLAIN = (bool, int, float, str, type(None))


class Autocast:
    """Whether autocast is on when this is made, for each type of device; as a context, the same again."""

    def __init__(self) -> None:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        cache = torch.is_autocast_cache_enabled()
        self.states = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), cache) for d in devices]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled, cache in self.states:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


@contextlib.contextmanager
def replay_rng(state: RNGState | None) -> Iterator[None]:
    """Draw random numbers from this state on, and go on from the one of now afterwards; None: nothing is drawn."""
    if state is None:
        yield
        return
    now = rng_state()
    state.restore()
    try:
        yield
    finally:
        now.restore()
