"""Restore ordinary dispatch where torch has disabled autograd or vmap: in an operator or a trace."""

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
    """The dispatch keys that a new thread includes and excludes."""
    keys: list[Any] = []

    def read_keys() -> None:
        keys.append(included_dispatch_keys())
        keys.append(excluded_dispatch_keys())

    thread = threading.Thread(target=read_keys)
    thread.start()
    thread.join()
    return keys[0], keys[1]


@contextlib.contextmanager
def ordinary_dispatch(grad: bool) -> Iterator[None]:
    """Enable autograd and vmap inside an operator, where the dispatcher has disabled them."""
    with DispatchKeyGuard(*_fresh_dispatch_keys()), torch.set_grad_enabled(grad):
        yield
