"""Ordinary tensor operations where PyTorch has switched parts of itself off: inside an operator, or during a trace."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["ordinary_dispatch"]


@functools.cache
def _fresh_dispatch_keys() -> tuple[Any, Any]:
    """What the dispatcher includes and excludes in a thread where nothing has been switched on or off."""
    found: list[Any] = []

    def look() -> None:
        found.append(torch._C._dispatch_tls_local_include_set())
        found.append(torch._C._dispatch_tls_local_exclude_set())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0], found[1]


@contextlib.contextmanager
def ordinary_dispatch(grad: bool) -> Iterator[None]:
    """Let autograd and vmap work inside an operator, where the dispatcher has switched them off."""
    with torch._C._ForceDispatchKeyGuard(*_fresh_dispatch_keys()), torch.set_grad_enabled(grad):
        yield
