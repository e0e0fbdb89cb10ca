"""Plain Python values of the model that a captured step depends on: `self.tau`, `if self.flag`, `self.sizes[0]`.

A graph holds them as they were when it was captured. Capture notes down which attributes the model's code read, and
the net compares them at every call: after a change it captures the model again, instead of going on with what was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from snnfx.capture.leaf_module_states import LeafModuleStates
from snnfx.capture.read_tracking_list import ReadTrackingList
from snnfx.capture.recorder import Recorder
from snnfx.errors import CaptureError
from snnfx.ir.setting_read import SettingRead
from snnfx.sandbox.contents_snapshot import MISSING
from snnfx.sandbox.user_code import PACKAGE, location_of_forward

__all__ = ["WatchedSetting", "first_changed_setting", "recorded_reads", "watch_settings"]

_SCALARS = (bool, int, float, complex, str, type(None))
_MOST_ELEMENTS = 64
"""Longer lists and dicts are data, not settings."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_MACHINERY = (
    PACKAGE,
    os.path.join(_TORCH, "fx", ""),
    os.path.join(_TORCH, "nn", "modules", "module.py"),
    os.path.join(_TORCH, "nn", "modules", "container.py"),
)
"""Who reads attributes of a module without computing with them."""


@dataclass(frozen=True)
class WatchedSetting:
    """A `SettingRead` with the module that it is looked up on."""

    module: nn.Module
    name: str
    value: Any
    qualified_name: str
    shown: str


_INTERNALS = frozenset(vars(nn.Module()))
"""What every module has: `training`, which is captured in both values, and its registries."""
_UNSUITABLE = object()
_MISSING = "(missing)"


def contents(value: Any, depth: int = 0) -> Any:
    """The value as something to compare with later: itself, or what is in it now; a mark if it is no plain value."""
    if isinstance(value, _SCALARS):
        return value
    if depth == 3 or isinstance(value, ReadTrackingList):
        return _UNSUITABLE
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, tuple | list):
        pairs = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, types.SimpleNamespace):
        pairs = list(vars(value).items())
    else:
        return _UNSUITABLE
    if len(pairs) > _MOST_ELEMENTS:
        return _UNSUITABLE
    # Of a settings object only the plain values are compared.
    inside = [(key, contents(element, depth + 1)) for key, element in pairs]
    return tuple((key, element) for key, element in inside if element is not _UNSUITABLE)


@contextlib.contextmanager
def recorded_reads(
    recorder: Recorder, leaf_states: LeafModuleStates, reads: dict[tuple[nn.Module, str], tuple[Any, str]]
) -> Iterator[None]:
    """While a step is traced, note down in `reads` the plain values that the model's code reads from modules."""

    def read(self: nn.Module, name: str) -> Any:
        leaf_states.note_read(self, name)
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            recorder.first_reads.setdefault((self, name), MISSING)
            raise
        if name in _INTERNALS or recorder.is_evaluating:
            return value
        recorder.first_reads.setdefault((self, name), value)
        if hasattr(type(value), "__next__") and not isinstance(value, io.IOBase):
            _refuse_iterator(self, name, value)
        if (self, name) in reads:
            return value
        if isinstance(value, _SCALARS) or not callable(value):
            reader = sys._getframe(1).f_code.co_filename
            if not reader.startswith(_MACHINERY) and not reader.startswith("<") and _is_stored(self, name):
                kept = contents(value)
                if kept is not _UNSUITABLE and kept != ():
                    reads[self, name] = kept, repr(value)
        return value

    nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def _refuse_iterator(module: nn.Module, name: str, value: Any) -> None:
    """Refuse what a step is about to use up: nothing could put it back."""
    if not sys._getframe(2).f_code.co_filename.startswith(_MACHINERY) and name in module.__dict__:
        raise CaptureError(
            "SNNFX218",
            f"a step of {type(module).__name__} takes the next element of `{name}`",
            where=location_of_forward(module),
            why=f"a {type(value).__name__} is used up by it, and a net starts each call from the reset state.",
            hint=f'Count the steps instead: self.register_memory("{name}", 0) of a snnfx.MemoryModule, and '
            f"self.{name} += 1 in the step.",
        )


def _is_stored(module: nn.Module, name: str) -> bool:
    """Whether the attribute is kept in the instance or its class: what a property computes is read from elsewhere."""
    if name in object.__getattribute__(module, "__dict__"):
        return True
    found = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)
    return found is not None and not hasattr(type(found), "__get__")


def watch_settings(reads: Sequence[SettingRead], source: nn.Module) -> list[WatchedSetting]:
    """The reads with the modules of `source` that they are looked up on."""
    return [WatchedSetting(source.get_submodule(r.owner), r.name, r.value, r.qualified_name, r.shown) for r in reads]


def first_changed_setting(watched: Sequence[WatchedSetting]) -> tuple[WatchedSetting, Any] | None:
    """The first attribute that is another value now than when it was read, and that value; None while none is."""
    for scalar in watched:
        now = getattr(scalar.module, scalar.name, _MISSING)
        if now is scalar.value:
            continue
        if not isinstance(now, _SCALARS):
            now = contents(now)
        if type(now) is not type(scalar.value) or now != scalar.value:
            return scalar, getattr(scalar.module, scalar.name, _MISSING)
    return None
