"""The copy of a model that capture traces: its modules report reads and calls to the recorder.

The modules of the copy are instances of subclasses made for it. These subclasses do for one thread and one model what
patches of `nn.Module` would do for all: other threads, and the model itself, see nothing of a trace.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from snnfx.capture.proxy import StepProxy
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.state.leaf_modules import is_leaf

__all__ = [
    "ModuleRecorder",
    "RecordingCopy",
    "capture_lock",
    "classes_of_originals",
    "is_recording_module",
    "recording_modules",
]

_TORCH = os.path.dirname(torch.__file__) + os.sep


class _CaptureLock:
    """One capture at a time in a process; a thread that captures may capture another model meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        # Another thread of the parent process may hold the lock, and does not exist in the child.
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


capture_lock = _CaptureLock()


class ModuleRecorder(Protocol):
    """Receives the reads and calls of the modules of a `RecordingCopy`."""

    def read_of(self, module: nn.Module, name: str) -> Any:
        """The value of an attribute that `object.__getattribute__` finds, or AttributeError."""

    def registered(self, name: str, value: Any) -> Any:
        """The value to use for a parameter, buffer or submodule `value` of a module."""

    def call_of(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of calling a module; `forward` calls it unrecorded."""


class _Active(threading.local):
    recorder: ModuleRecorder | None = None
    copy: RecordingCopy | None = None


_active = _Active()


_INTERNALS = (frozenset(vars(nn.Module())) - {"training"}) | {"__class__", "__dict__"}
"""Attributes that every module has; they are read very often, and the recorder ignores them."""


class _RecordingModule(nn.Module):
    """The last base class before `nn.Module` of all modules of a copy."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        recorder, copy = _active.recorder, _active.copy
        if name == "training" and copy is not None and not copy.training_was_read:
            is_layer = sys._getframe(1).f_code.co_filename.startswith(_TORCH) and is_leaf(self)
            copy.training_was_read = not is_layer  # torch's layers read their own flag at each call
        if recorder is None or name in _INTERNALS:
            return object.__getattribute__(self, name)
        return recorder.read_of(self, name)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        recorder = _active.recorder
        return value if recorder is None else recorder.registered(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = _active.recorder
        if recorder is None:
            return nn.Module.__call__(self, *args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return nn.Module.__call__(self, *args, **kwargs)

        return recorder.call_of(self, forward, args, kwargs)


class _WithoutSubclassHook:
    """The first base class of a recording class: hides the `__init_subclass__` of the user's class."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        return None


_recording_classes: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def _recording_class(cls: type) -> type:
    """The subclass of a class of modules whose instances record; `__class__` of an instance is the class itself."""
    known = _recording_classes.get(cls)
    made = None if known is None else known()
    if made is None:
        attributes: dict[str, Any] = {
            "__slots__": (),
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__class__": property(lambda self: cls),
        }
        if hasattr(cls, "__del__"):
            attributes["__del__"] = lambda self: None  # the finalizer runs for the user's module only
        bases = (_WithoutSubclassHook, *(() if cls is nn.Module else (cls,)), _RecordingModule)
        # Not by calling the metaclass, which may register the class.
        made = type.__new__(type(cls), cls.__name__, bases, attributes)
        _recording_classes[cls] = weakref.ref(made)
    return made


class _TypeOfUser(type):
    """The class of the stand-in for `type`: it returns the user's class of a copied module, and Tensor for a proxy."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        found = type(*args, **kwargs)
        if len(args) != 1:
            return found
        if issubclass(found, _RecordingModule):
            return args[0].__class__
        if found is StepProxy and args[0].stands_for(Tensor):
            return Tensor
        return cls if found is type else found

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, type)


class _UserType(type, metaclass=_TypeOfUser):
    """Stands for `type` in code that compares classes or finds values by them, as in `type(self.fc) is nn.Linear`."""


@contextlib.contextmanager
def classes_of_originals(namespaces: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Let `type(value)` return the class of the user's value in code with these global variables."""
    added = [namespace for namespace in namespaces if "type" not in namespace]
    for namespace in added:
        namespace["type"] = _UserType
    try:
        yield
    finally:
        for namespace in added:
            if namespace.get("type") is _UserType:
                del namespace["type"]


def is_recording_module(module: nn.Module) -> bool:
    """Whether a module belongs to a copy that capture traces."""
    return issubclass(type(module), _RecordingModule)


class RecordingCopy:
    """A structural copy of a model for one capture.

    Attributes:
        model: the user's model.
        root: the copy.
        training_was_read: whether the graph may depend on the mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._copies = StructuralCopy(_recording_class)
        self.root: nn.Module = self._copies.of(model)
        # The step may read a class attribute `training` without an instance.
        classes = {c for m in model.modules() for c in type(m).__mro__} - {nn.Module}
        self.training_was_read = any("training" in vars(c) for c in classes)

    def original_of(self, value: Any) -> Any:
        """The user's object that a copied object stands for; any other object itself."""
        return self._copies.original_of(value)

    def copy_of(self, value: Any) -> Any:
        """The copied object that stands for an object of the user's model; any other object itself."""
        return self._copies.copy_of(value)

    def has_copy_of(self, value: Any) -> bool:
        """Whether an object belongs to the user's model."""
        return self._copies.copy_of(value) is not value

    def set_mode(self, training: bool) -> None:
        """Set the training flags of all modules; they stay those of the user's model if it is in this mode."""
        is_in_mode = self.model.__dict__.get("training") == training
        for module in self.root.modules():
            if "training" in module.__dict__:
                module.__dict__["training"] = (
                    self.original_of(module).__dict__.get("training", training) if is_in_mode else training
                )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Detect reads of `training` in this thread inside the context."""
        before, _active.copy = _active.copy, self
        try:
            yield
        finally:
            _active.copy = before


@contextlib.contextmanager
def recording_modules(recorder: ModuleRecorder) -> Iterator[None]:
    """Report reads and calls of the modules of copies to `recorder`, in this thread and inside the context."""
    before, _active.recorder = _active.recorder, recorder
    try:
        yield
    finally:
        _active.recorder = before
