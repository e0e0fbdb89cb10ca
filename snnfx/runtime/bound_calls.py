"""Bind the calls of a net: after the first call with some inputs, later ones run one flat list of launches.

A key has what a binding depends on: shapes, strides, dtypes and devices of the inputs, gradient and training mode. What
else may change between calls is checked by one generated function for each binding. Calls that carry state, pass
arguments by name, are chunked or recompute run unbound, and so do calls under transforms, dispatch modes or autocast.
The loops of a model that runs over time itself are bound alike, from their reset state. If the first step has a graph
of its own, that graph and the one of the later steps are bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.emit.bound_graph import BoundGraph, bind_graph
from snnfx.emit.bounded_cache import BoundedCache
from snnfx.emit.executable import Executable
from snnfx.runtime.guard_check import GuardCheck
from snnfx.sandbox.torch_internals import (
    are_transforms_active,
    dispatch_mode_count,
    forward_mode_level,
    has_global_hooks,
    tracing_state,
)

__all__ = ["BoundCalls"]

_MOST_KEYS = 64
_LONGEST_WAIT = 1024
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@dataclass
class _Wait:
    """How many calls run unbound before the next binding.

    Args:
        left: for the next binding.
        after_next: for the binding after the next one.
    """

    left: int = 1
    after_next: int = 1


class BoundCalls:
    """The bound calls of one executable.

    Args:
        executable: the executable; its graphs must be emitted.
        guards: the guards of each mode.
        part: the part that the calls run: "plain", or "iterations" for the loops of a whole call.
    """

    def __init__(self, executable: Executable, guards: dict[bool, GuardCheck], part: str = "plain") -> None:
        self.executable, self.guards, self.part = executable, guards, part
        self._bound: BoundedCache[BoundGraph] = BoundedCache(_MOST_KEYS)
        self._waits: BoundedCache[_Wait] = BoundedCache(_MOST_KEYS)

    def find(self, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The function that runs a call with these arguments; None if the call has to run unbound."""
        if not self._bound.is_filled:
            return None
        key = self._key(args)
        bound = self._bound.peek(key) if key is not None else None
        if bound is None or not _is_plain_context(args[0].device.type):
            return None
        if bound.is_valid() and self.guards[self.executable.source.training].holds():
            return bound.run
        self._bound.drop(key)
        return None

    def bind_later(self, args: tuple[Any, ...], run: Callable[..., Any]) -> None:
        """Bind calls like this one from the second on, because sizes that occur once are not worth it.

        Args:
            args: the arguments of the call.
            run: the function that runs all steps of the call at once; a graph with recomputation stays unbound.
        """
        executable = self.executable
        mode, is_plain = executable.source.training, self.part == "plain"
        runner = executable.graph_runner("plain" if is_plain else "main")
        if runner is None or run is not runner:
            return
        key = self._due(args)
        if key is None:
            return
        graphs = executable.graphs
        graph = graphs.emitted.get((mode, "plain")) if is_plain else graphs.iterations(mode)
        bound = None if graph is None else bind_graph(graph, executable.root)
        if bound is not None:
            self._bound.put(key, bound)

    def bind_first_later(self, args: tuple[Any, ...], run_with: Callable[..., Any]) -> None:
        """Bind calls like this one, whose first step has a graph of its own, from the second on.

        Args:
            args: the arguments of the call.
            run_with: runs a call, given functions for the first step and for the later steps, and the arguments.
        """
        key = self._due(args)
        if key is None:
            return
        graphs, mode, root = self.executable.graphs, self.executable.source.training, self.executable.root
        first = bind_graph(graphs.emitted[mode, "first"], root, from_reset=True)
        rest = bind_graph(graphs.emitted[mode, "main"], root)
        if first is None or rest is None:
            return
        run_first, run_rest, are_valid = first.run, rest.run, (first.is_valid, rest.is_valid)

        def run(*args: Tensor) -> Any:
            return run_with(run_first, run_rest, args)

        self._bound.put(key, BoundGraph(run, lambda: are_valid[0]() and are_valid[1]()))

    def _due(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The key of a call that is bound now; None if it stays unbound."""
        guards = self.guards[self.executable.source.training].guards
        if self.executable.graphs.is_replaced or guards.modes:
            return None
        key = self._key(args)
        if key is None or not _is_plain_context(args[0].device.type):
            return None
        wait = self._waits.get_or_make(key, _Wait)
        wait.left -= 1
        if wait.left >= 0:
            return None
        # A binding that was invalid is made again, but ever later: a setting may change at each call.
        wait.left = wait.after_next = min(2 * wait.after_next, _LONGEST_WAIT)
        return key

    def _key(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What the binding of a call depends on; None if an argument is not a plain tensor."""
        key: list[Any] = [
            self.executable.source.training,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
        ]
        for x in args:
            if type(x) not in _PLAIN or x.layout is not torch.strided:
                return None
            key += (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
        return tuple(key) if args else None


_has_autocast = functools.cache(torch.amp.is_autocast_available)
"""Whether autocast knows a type of device."""


def _is_plain_context(device: str) -> bool:
    """Whether nothing intercepts the calls of this thread."""
    return not (
        dispatch_mode_count()
        or are_transforms_active()
        or forward_mode_level() >= 0
        or tracing_state() is not None
        or has_global_hooks()
        or (_has_autocast(device) and torch.is_autocast_enabled(device))
    )
