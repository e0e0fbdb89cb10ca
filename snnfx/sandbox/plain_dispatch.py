"""Ordinary tensor operations where PyTorch has switched parts of itself off: inside an operator, or during a trace."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from snnfx.sandbox.torch_internals import DispatchKeyGuard, excluded_dispatch_keys, included_dispatch_keys

__all__ = ["ordinary_dispatch"]


@functools.cache
def _fresh_dispatch_keys() -> tuple[Any, Any]:
    """What the dispatcher includes and excludes in a thread where nothing has been switched on or off."""
    found: list[Any] = []

    def look() -> None:
        found.append(included_dispatch_keys())
        found.append(excluded_dispatch_keys())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0], found[1]


@contextlib.contextmanager
def ordinary_dispatch(grad: bool) -> Iterator[None]:
    """Let autograd and vmap work inside an operator, where the dispatcher has switched them off."""
    with DispatchKeyGuard(*_fresh_dispatch_keys()), torch.set_grad_enabled(grad):
        yield
