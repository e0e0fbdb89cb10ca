"""Runs that leave no trace: everything that a run of a model can change is put back behind it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from snnfx.sandbox.snapshot import StateSnapshot

__all__ = [
    "RNGState",
    "autocast_cache_disabled",
    "in_mode",
    "isolated",
    "rng_state",
]


class RNGState:
    """The states of torch's random number generators, that of the CPU first; made by `rng_state`."""

    def __init__(self, states: list[Tensor]) -> None:
        self.states = states

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RNGState) or len(self.states) != len(other.states):
            return False
        return all(torch.equal(a, b) for a, b in zip(self.states, other.states, strict=True))

    def restore(self) -> None:
        """Go on drawing from here."""
        torch.set_rng_state(self.states[0])
        if len(self.states) > 1:
            torch.cuda.set_rng_state_all(self.states[1:])


def rng_state() -> RNGState:
    """The states of the generators now."""
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return RNGState([torch.get_rng_state(), *on_devices])


@contextmanager
def isolated(*modules: nn.Module) -> Iterator[None]:
    """Put everything that a run can change back afterwards."""
    snapshots, python_random = [StateSnapshot.of(module) for module in modules], random.getstate()
    buffers = {buffer: buffer.detach().clone() for module in modules for buffer in module.buffers()}
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        for buffer, value in buffers.items():
            # BatchNorm writes its statistics past the version counter; somebody else's graph may rely on that.
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
        random.setstate(python_random)


@contextmanager
def autocast_cache_disabled() -> Iterator[None]:
    """Autocast keeps no cast weights: after a run on fake tensors, a real one would compute with fake weights."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


@contextmanager
def in_mode(net: nn.Module, training: bool) -> Iterator[None]:
    """A net and its model in this mode; if they are not, every flag is put back afterwards."""
    if net.training == training:
        yield
        return
    flags = [(module, module.training) for module in net.modules()]
    net.train(training)
    try:
        yield
    finally:
        net.train(not training)  # a net sets the flag of its model, which is no child of it
        for module, flag in flags:
            module.training = flag
