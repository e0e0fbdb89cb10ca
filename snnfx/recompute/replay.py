"""Restore module settings, RNG state and autocast of the forward pass for recomputation.

State is a value, so a second run cannot change it. A run also depends on the mode, the settings and the buffers of
modules, on the RNG state, and on autocast. Buffers are replaced by copies, so that running statistics are updated once.
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

__all__ = ["AutocastState", "ModuleSettings", "parameters_of", "recompute_lock", "replay_rng"]

recompute_lock = threading.RLock()
"""Acquired while a segment runs: recomputation replaces the parameters of modules, which no other thread may see."""


def parameters_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The parameters of modules, without those of their children, each once."""
    return list({id(p): p for m in modules for p in m._parameters.values() if p is not None}.values())


@dataclass
class ModuleSettings:
    """The mode, settings and parameters of modules at the time of construction."""

    modules: list[nn.Module]
    parameters: list[Tensor]

    def __post_init__(self) -> None:
        number = {id(p): i for i, p in enumerate(self.parameters)}
        self.locations: list[tuple[Any, Any, int]] = [
            (m._parameters, key, number[id(p)])
            for m in self.modules
            for key, p in m._parameters.items()
            if p is not None
        ]
        for m in self.modules:
            if isinstance(m, nn.RNNBase):
                # Its forward reads the parameters from this list, not from `_parameters`.
                weights = enumerate(m._flat_weights)
                self.locations += [(m._flat_weights, i, number[id(p)]) for i, p in weights if id(p) in number]
        self.training = [m.training for m in self.modules]
        self.settings = [_settings_of(m) for m in self.modules]

    def copy_buffers(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Copies of the buffers that a run may change (modules in training mode), as `(registry, name, copy)`."""
        changing = [m for m in self.modules if m.training]
        return [(m._buffers, key, b.clone()) for m in changing for key, b in m._buffers.items() if b is not None]

    @contextlib.contextmanager
    def restored(
        self, parameters: Sequence[Tensor], buffers: Sequence[tuple[dict[str, Any], str, Tensor]]
    ) -> Iterator[None]:
        """Restore mode and settings, with these parameters and with copies of these buffers, for a block."""
        undo: list[tuple[Any, Any, Any]] = []
        registry: Any
        recompute_lock.acquire()
        modes = [(m, m.training) for m in self.modules]
        try:
            for registry, key, index in self.locations:
                undo.append((registry, key, registry[key]))
                registry[key] = parameters[index]
            for registry, key, value in buffers:
                undo.append((registry, key, registry[key]))
                registry[key] = value.clone()
            for module, training, settings in zip(self.modules, self.training, self.settings, strict=True):
                module.training = training
                for name, value in settings.items():
                    current = module.__dict__.get(name, value)
                    if current is not value and (type(current) is not type(value) or current != value):
                        undo.append((module.__dict__, name, current))
                        module.__dict__[name] = value
            yield
        finally:
            for registry, key, original in reversed(undo):
                registry[key] = original
            for module, training in modes:
                module.training = training
            recompute_lock.release()


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """Numbers and flags in the attributes of a module, e.g. the leak of a neuron or the eps of a BatchNorm."""
    settings = {name: value for name, value in module.__dict__.items() if type(value) in _PLAIN and name != "training"}
    for name, table in module.__dict__.items():
        # Initial values of states are such a table.
        if type(table) is dict and table and all(type(value) in _PLAIN for value in table.values()):
            settings[name] = dict(table)
    return settings


_PLAIN = (bool, int, float, str, type(None))


class AutocastState:
    """The autocast settings of each device type at the time of construction."""

    def __init__(self) -> None:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        cache = torch.is_autocast_cache_enabled()
        self.states = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), cache) for d in devices]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore these autocast settings for a block."""
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled, cache in self.states:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            yield


@contextlib.contextmanager
def replay_rng(state: RNGState | None) -> Iterator[None]:
    """Draw random numbers from this RNG state within a block; None: leave the RNG alone."""
    if state is None:
        yield
        return
    current = rng_state()
    state.restore()
    try:
        yield
    finally:
        current.restore()
