"""Locks of modules that are stepped by changing their attributes: one thread at a time steps such a module."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["stepped_by_one_thread"]

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


@contextlib.contextmanager
def stepped_by_one_thread(*modules: nn.Module) -> Iterator[None]:
    """Acquire the locks of modules for one step.

    Nothing waits for another thread while it steps a module, so a backward pass in another thread may step it too.
    """
    if torch.compiler.is_compiling():
        yield
        return
    locks = [_lock_of(module) for module in modules]
    if len(locks) > 1:
        locks = sorted(dict.fromkeys(locks), key=id)  # one order for all threads, against deadlocks
    for lock in locks:
        lock.acquire()
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


def _lock_of(module: nn.Module) -> threading.RLock:
    lock = _locks.get(module)
    if lock is None:
        with _making:
            lock = _locks.get(module)
            if lock is None:
                lock = _locks[module] = threading.RLock()
    return lock
