"""Run a model without side effects: restore everything that the run can change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from snnfx.sandbox.rng_states import rng_restorer
from snnfx.sandbox.snapshot import StateSnapshot

__all__ = ["autocast_cache_disabled", "in_mode", "isolated"]


@contextmanager
def isolated(*modules: nn.Module, rng: bool = True) -> Iterator[None]:
    """Restore state, attributes and buffers of the modules when the context exits.

    Args:
        modules: the modules that run inside the context.
        rng: whether to restore the RNG states as well. Other threads then draw the numbers of that time twice:
            in a call of a net, use `snnfx.sandbox.random_draws.draws_undone`.
    """
    restore_functions = [StateSnapshot.of(module, rng=False).restore for module in modules]
    if rng:
        restore_functions.append(rng_restorer())
    try:
        yield
    finally:
        for restore in restore_functions:
            restore()


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
