"""Refuse or undo the random draws of a thread; the generators belong to all threads of a process.

A generator's state is saved just before the thread draws from it, so that a thread that draws nothing rewinds the
numbers of no other thread. Draws of torch are seen by a dispatch mode, those of Python by a profile function. NumPy's
draws are visible to neither: its state is saved before the first call of code that refers to `numpy.random`.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch

from snnfx.sandbox.profile_function import restore_profile
from snnfx.sandbox.rng_states import numpy_rng_state, restore_numpy_rng_state, rng_state
from snnfx.sandbox.torch_internals import FakeTensor, TorchDispatchMode, pytree

__all__ = ["PYTHON_GENERATOR", "draws_undone", "refers_to_numpy_random", "refusing_draws"]

PYTHON_GENERATOR = random.random.__self__  # type: ignore[attr-defined]
"""Python's global generator."""


_GAUSS = random.Random.gauss.__code__
"""Every second number of `gauss` is stored, and read without a call of a method in C."""


@contextlib.contextmanager
def refusing_draws() -> Iterator[None]:
    """Raise RuntimeError in place of a draw from a generator of torch or Python, inside the context."""
    before = sys.getprofile()
    with _DrawMode(_refuse_draw):
        sys.setprofile(_refuse_python_draws)
        try:
            yield
        finally:
            restore_profile(before)


@contextlib.contextmanager
def draws_undone() -> Iterator[None]:
    """Restore the generators of torch, Python and NumPy that this thread draws from inside the context."""
    before, saved = sys.getprofile(), _SavedStates()
    try:
        with _DrawMode(lambda func: saved.save_torch()):
            sys.setprofile(saved.profile)
            try:
                yield
            finally:
                restore_profile(before)
    finally:
        saved.restore()


class _SavedStates:
    """The states of the generators before the first draw of this thread."""

    def __init__(self) -> None:
        self._restore: dict[str, Callable[[], None]] = {}
        self._codes: dict[CodeType, bool] = {}

    def save_torch(self) -> None:
        if "torch" not in self._restore:
            self._restore["torch"] = rng_state().restore

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            owner = getattr(argument, "__self__", None)
            if owner is PYTHON_GENERATOR:
                self._save_python()
            elif isinstance(owner, torch.Generator):  # `torch.manual_seed`
                self.save_torch()
        elif event == "call":
            code = frame.f_code
            if code is _GAUSS:
                self._save_python()
            if "numpy" in self._restore:
                return
            refers = self._codes.get(code)
            if refers is None:
                refers = self._codes[code] = refers_to_numpy_random(code, frame.f_globals)
            if refers:
                numpy_state = numpy_rng_state()
                self._restore["numpy"] = lambda: restore_numpy_rng_state(numpy_state)

    def _save_python(self) -> None:
        if "python" not in self._restore:
            state = random.getstate()
            self._restore["python"] = lambda: random.setstate(state)

    def restore(self) -> None:
        for restore in self._restore.values():
            restore()


def refers_to_numpy_random(code: CodeType, namespace: dict[str, Any]) -> bool:
    """Whether a function names `numpy.random`, one of its functions, or a generator of NumPy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    generators = (numpy.random.RandomState, numpy.random.Generator)
    for name in code.co_names:
        value = namespace.get(name)
        if name == "numpy" or value is numpy:
            if "random" in code.co_names:
                return True
        elif value is numpy.random or isinstance(getattr(value, "__self__", value), generators):
            return True
    return False


def _refuse_draw(func: Any) -> None:
    raise RuntimeError(f"the code draws a random number: {func}")


def _refuse_python_draws(frame: FrameType, event: str, argument: Any) -> None:
    if frame.f_code is _GAUSS or (event == "c_call" and type(getattr(argument, "__self__", None)) is random.Random):
        raise RuntimeError("the code draws a random number from Python")


class _DrawMode(TorchDispatchMode):
    """Calls a function before each operator that draws random numbers."""

    def __init__(self, before_draw: Callable[[Any], None]) -> None:
        super().__init__()
        self._before_draw = before_draw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _runs_on_meta(args, kwargs or {}):
            self._before_draw(func)
        return func(*args, **(kwargs or {}))


def _runs_on_meta(args: Any, kwargs: Any) -> bool:
    """Whether an operator computes shapes only, so that it draws nothing."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return True
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
