"""Restore module settings, RNG state and autocast of the forward pass for recomputation.

State is a value, so a second run cannot change it. A run also depends on the mode, the settings and the buffers of
modules, on the RNG state, and on autocast. Backward runs structural copies of the modules with detached parameters and
copied buffers: running statistics are updated once, and other threads see only the modules themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.sandbox.rng_states import RNGState, rng_state
from snnfx.sandbox.structural_copy import StructuralCopy

__all__ = ["AutocastState", "Buffers", "ModuleReplicas", "ModuleSettings", "parameters_of", "replay_rng"]


def parameters_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The parameters of modules, without those of their children, each once."""
    return list({id(p): p for m in modules for p in m._parameters.values() if p is not None}.values())


Buffers = list[tuple[int, str, Tensor]]
"""Values of buffers: the number of the module, the name, the value."""


@dataclass
class ModuleSettings:
    """The mode, settings and parameters of modules at the time of construction."""

    modules: list[nn.Module]
    parameters: list[Tensor]

    def __post_init__(self) -> None:
        number = {id(p): i for i, p in enumerate(self.parameters)}
        self.locations: list[tuple[int, str, Any, int]] = [
            (i, "_parameters", key, number[id(p)])
            for i, m in enumerate(self.modules)
            for key, p in m._parameters.items()
            if p is not None
        ]
        for i, m in enumerate(self.modules):
            if isinstance(m, nn.RNNBase):
                # Its forward reads the parameters from this list, not from `_parameters`.
                weights = enumerate(m._flat_weights)
                self.locations += [(i, "_flat_weights", k, number[id(p)]) for k, p in weights if id(p) in number]
        self.training = [m.training for m in self.modules]
        self.settings = [_settings_of(m) for m in self.modules]

    def copy_buffers(self) -> Buffers:
        """Copies of the buffers that a run may change: those of modules in training mode."""
        changing = [(i, m) for i, m in enumerate(self.modules) if m.training]
        return [(i, key, b.clone()) for i, m in changing for key, b in m._buffers.items() if b is not None]

    def replicas(self, parameters: Sequence[Tensor], buffers: Buffers) -> ModuleReplicas:
        """Copies of the modules with mode and settings of the forward run, with these parameters and buffers."""
        replicas = ModuleReplicas(self.modules, buffers)
        for i, registry, key, index in self.locations:
            replicas.modules[i].__dict__[registry][key] = parameters[index]
        for module, training, settings in zip(replicas.modules, self.training, self.settings, strict=True):
            module.training = training
            module.__dict__.update(settings)
        return replicas


class ModuleReplicas:
    """Structural copies of modules, on which backward recomputes: other threads use the modules meanwhile.

    Args:
        modules: the modules.
        buffers: the values of buffers at the beginning of each run.
    """

    def __init__(self, modules: Sequence[nn.Module], buffers: Buffers) -> None:
        self._copies = StructuralCopy(objects=False)  # kernels are cached by the identity of objects
        self.modules: list[nn.Module] = [self._copies.of(m) for m in modules]
        self._buffers = buffers

    def of(self, module: nn.Module) -> nn.Module:
        """The replica of one of the modules."""
        return self._copies.of(module)  # type: ignore[no-any-return]

    def restart(self) -> None:
        """Set the buffers to copies of their first values, which a run may change."""
        for i, key, value in self._buffers:
            self.modules[i]._buffers[key] = value.clone()


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
