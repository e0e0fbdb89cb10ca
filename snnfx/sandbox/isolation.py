"""Run a model without side effects: restore everything that the run can change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from snnfx.sandbox.snapshot import StateSnapshot
from snnfx.sandbox.tensor_values import restore_value

__all__ = [
    "RNGState",
    "autocast_cache_disabled",
    "in_mode",
    "isolated",
    "rng_state",
]


class RNGState:
    """RNG states of torch, first the CPU generator, then the CUDA devices; see `rng_state`."""

    def __init__(self, states: list[Tensor]) -> None:
        self.states = states

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RNGState) or len(self.states) != len(other.states):
            return False
        return all(torch.equal(a, b) for a, b in zip(self.states, other.states, strict=True))

    def restore(self) -> None:
        """Set the generators of torch to these states."""
        torch.set_rng_state(self.states[0])
        if len(self.states) > 1:
            torch.cuda.set_rng_state_all(self.states[1:])


def rng_state() -> RNGState:
    """The current RNG states of torch."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return RNGState([torch.get_rng_state(), *cuda_states])


@contextmanager
def isolated(*modules: nn.Module, rng: bool = True) -> Iterator[None]:
    """Restore state, attributes and buffers of the modules when the context exits.

    Args:
        modules: the modules that run inside the context.
        rng: whether to restore the RNG states as well. Other threads then draw the numbers of that time twice:
            in a call of a net, use `snnfx.sandbox.random_draws.draws_undone`.
    """
    snapshots, python_state = [StateSnapshot.of(module, rng) for module in modules], random.getstate()
    buffers = {buffer: buffer.detach().clone() for module in modules for buffer in module.buffers()}
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        for buffer, value in buffers.items():
            restore_value(buffer, value)
        if rng:
            random.setstate(python_state)


@contextmanager
def autocast_cache_disabled() -> Iterator[None]:
    """Disable autocast's weight cache: a run on fake tensors would leave fake weights in it for real runs."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


@contextmanager
def in_mode(net: nn.Module, training: bool) -> Iterator[None]:
    """Set a net and its model to training or evaluation mode, and restore every flag on exit."""
    if net.training == training:
        yield
        return
    flags = [(module, module.training) for module in net.modules()]
    net.train(training)
    try:
        yield
    finally:
        net.train(not training)  # also sets the flag of the model, which is not a submodule of the net
        for module, flag in flags:
            module.training = flag
