"""Settings: plain Python values that a captured step depends on, such as `self.tau` or `if self.flag`.

A graph contains their values at capture. Capture records which attributes the model's code reads, and the net compares
them at every call: after a change it captures the model again.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from snnfx.capture.leaf_module_states import LeafModuleStates
from snnfx.capture.read_tracking_list import ReadTrackingList
from snnfx.capture.recorder import Recorder
from snnfx.errors import CaptureError
from snnfx.ir.guards import text_of
from snnfx.ir.setting_read import SettingRead
from snnfx.sandbox.contents_snapshot import MISSING
from snnfx.sandbox.user_code import PACKAGE, location_of_forward

__all__ = ["SettingReads", "WatchedSetting", "first_changed_setting", "watch_settings"]

_SCALARS = (bool, int, float, complex, str, type(None))
_MOST_ELEMENTS = 64
"""Longer lists and dicts count as data, not as settings."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_INDIRECT_READERS = (
    PACKAGE,
    os.path.join(_TORCH, "fx", ""),
    os.path.join(_TORCH, "nn", "modules", "module.py"),
    os.path.join(_TORCH, "nn", "modules", "container.py"),
)
"""Code that reads module attributes without computing with them."""


@dataclass(frozen=True)
class WatchedSetting:
    """A `SettingRead` and the module that has the attribute."""

    module: nn.Module
    name: str
    value: Any
    qualified_name: str
    shown: str


_MODULE_INTERNALS = frozenset(vars(nn.Module()))
"""Attributes of every module: its registries, and `training`, which is captured with both values."""
_NOT_COMPARABLE = object()
_MISSING = "(missing)"


def contents(value: Any, depth: int = 0) -> Any:
    """A comparable copy of a plain value or container; `_NOT_COMPARABLE` for any other value."""
    if isinstance(value, _SCALARS):
        return value
    if depth == 3 or isinstance(value, ReadTrackingList):
        return _NOT_COMPARABLE
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, tuple | list):
        pairs = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, types.SimpleNamespace):
        pairs = list(vars(value).items())
    else:
        return _NOT_COMPARABLE
    if len(pairs) > _MOST_ELEMENTS:
        return _NOT_COMPARABLE
    # Only the plain values in a settings object are compared.
    elements = [(key, contents(element, depth + 1)) for key, element in pairs]
    return tuple((key, element) for key, element in elements if element is not _NOT_COMPARABLE)


class SettingReads:
    """Records the plain values that the model's code reads from modules during a trace.

    Args:
        recorder: records the step.
        leaf_states: detects reads of the states of leaf modules.
        reads: the recorded reads: comparable value and text, by module and attribute.
    """

    def __init__(
        self, recorder: Recorder, leaf_states: LeafModuleStates, reads: dict[tuple[nn.Module, str], tuple[Any, str]]
    ) -> None:
        self.recorder, self.leaf_states, self.reads = recorder, leaf_states, reads

    def read_of(self, module: nn.Module, name: str) -> Any:
        """The value of an attribute that the model's code reads from a module."""
        recorder, reads = self.recorder, self.reads
        self.leaf_states.note_read(module, name)
        if not recorder.is_evaluating and _is_read_by_user(sys._getframe(_READER)):
            recorder.user_reads[module, name] = None
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            recorder.first_reads.setdefault((module, name), MISSING)
            raise
        if name in _MODULE_INTERNALS or recorder.is_evaluating:
            return value
        recorder.first_reads.setdefault((module, name), value)
        if hasattr(type(value), "__next__") and not isinstance(value, io.IOBase):
            _refuse_iterator(module, name, value)
        if (module, name) in reads:
            return value
        if isinstance(value, _SCALARS) or not callable(value):
            reader = sys._getframe(_READER).f_code.co_filename
            if not reader.startswith((*_INDIRECT_READERS, "<")) and _is_stored(module, name):
                comparable = contents(value)
                is_empty = isinstance(comparable, tuple) and not comparable
                if comparable is not _NOT_COMPARABLE and not is_empty:
                    reads[module, name] = comparable, text_of(value)
        return value


_READER = 3
"""The frame that reads an attribute, seen from `SettingReads.read_of`: behind the tracer and the module."""


def _is_read_by_user(frame: types.FrameType) -> bool:
    """Whether the code of a frame computes with the attributes that it reads."""
    return not frame.f_code.co_filename.startswith(_INDIRECT_READERS)


def _refuse_iterator(module: nn.Module, name: str, value: Any) -> None:
    """Refuse a step that advances an iterator, because no snapshot can restore it."""
    if not sys._getframe(_READER + 1).f_code.co_filename.startswith(_INDIRECT_READERS) and name in module.__dict__:
        raise CaptureError(
            "SNNFX218",
            f"a step of {type(module).__name__} advances the iterator `{name}`",
            where=location_of_forward(module),
            why=f"a {type(value).__name__} cannot be reset, but each call of a net starts from the reset state.",
            hint=f'Count the steps instead: call self.register_memory("{name}", 0) in a snnfx.MemoryModule, and '
            f"write self.{name} += 1 in the step.",
        )


def _is_stored(module: nn.Module, name: str) -> bool:
    """Whether the instance or its class stores the attribute; a property reads other attributes instead."""
    if name in object.__getattribute__(module, "__dict__"):
        return True
    stored = next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)
    return stored is not None and not hasattr(type(stored), "__get__")


def watch_settings(reads: Sequence[SettingRead], source: nn.Module) -> list[WatchedSetting]:
    """Pair each read with its module in `source`."""
    return [WatchedSetting(source.get_submodule(r.owner), r.name, r.value, r.qualified_name, r.shown) for r in reads]


def first_changed_setting(watched: Sequence[WatchedSetting]) -> tuple[WatchedSetting, Any] | None:
    """The first setting that changed since capture, and its new value; None if no setting changed."""
    for setting in watched:
        now = getattr(setting.module, setting.name, _MISSING)
        if now is setting.value:
            continue
        if not isinstance(now, _SCALARS):
            now = contents(now)
        if type(now) is not type(setting.value) or now != setting.value:
            return setting, getattr(setting.module, setting.name, _MISSING)
    return None
