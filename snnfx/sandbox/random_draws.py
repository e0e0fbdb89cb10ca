"""Refuse random draws of a thread before they happen; the generators belong to all threads of a process."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from snnfx.sandbox.torch_internals import TorchDispatchMode

__all__ = ["refusing_draws"]


@contextlib.contextmanager
def refusing_draws() -> Iterator[None]:
    """Raise RuntimeError in place of a draw from a generator of torch or Python, inside the context."""
    before = sys.getprofile()
    with _RefusingMode():
        sys.setprofile(_refuse_python_draws)
        try:
            yield
        finally:
            sys.setprofile(before)


def _refuse_python_draws(frame: FrameType, event: str, argument: Any) -> None:
    if event == "c_call" and type(getattr(argument, "__self__", None)) is random.Random:
        raise RuntimeError("the code draws a random number from Python")


class _RefusingMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"the code draws a random number: {func}")
        return func(*args, **(kwargs or {}))
