"""Runs that leave no trace: everything that a run of a model can change is put back behind it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from snnfx.snapshot import StateSnapshot
from snnfx.state import reset_net

__all__ = [
    "RandomState",
    "copies_in_float64",
    "in_mode",
    "random_state",
    "to_float64",
    "undisturbed",
    "without_cached_casts",
]


class RandomState:
    """The states of torch's random number generators, that of the CPU first; made by `random_state`."""

    def __init__(self, states: list[Tensor]) -> None:
        self.states = states

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState) or len(self.states) != len(other.states):
            return False
        return all(torch.equal(a, b) for a, b in zip(self.states, other.states, strict=True))

    def restore(self) -> None:
        """Go on drawing from here."""
        torch.set_rng_state(self.states[0])
        if len(self.states) > 1:
            torch.cuda.set_rng_state_all(self.states[1:])


def random_state() -> RandomState:
    """The states of the generators now."""
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return RandomState([torch.get_rng_state(), *on_devices])


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
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
def without_cached_casts() -> Iterator[None]:
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


def to_float64(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if x.is_floating_point() or x.is_complex() else x


def copies_in_float64(model: nn.Module, net: Any) -> tuple[nn.Module, Any]:
    """Deep copies in float64, which share with each other what the originals share."""
    with undisturbed(model, net):
        reset_net(model)
        reset_net(net)
        attributes = [_plain_attributes(module) for root in (model, net) for module in root.modules()]
        # deepcopy refuses tensors that are the result of something that can be differentiated.
        memo = {id(x): x.detach().clone() for x in pytree.tree_leaves(attributes) if _has_history(x)}
        model, net = copy.deepcopy((model, net), memo)
    for root in (model, net):
        root.double()
        for module in root.modules():
            for key, value in _plain_attributes(module).items():
                # Not parameters or buffers, so `double` leaves them alone: first states, constants, masks.
                if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                    module.__dict__[key] = pytree.tree_map_only(Tensor, to_float64, value)
    return model, net


def _has_history(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_leaf


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
