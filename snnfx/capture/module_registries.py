"""Let lists in classes refer to the copied modules of a trace, as the list of all neurons that snnTorch resets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from snnfx.capture.recording_copy import RecordingCopy
from snnfx.state.registry import adapter_of

__all__ = ["registries_of_copies"]


@contextmanager
def registries_of_copies(copy: RecordingCopy) -> Iterator[None]:
    """Replace the modules of a model by their copies in the lists that the classes of its modules store.

    A library that resets all its neurons by such a list must not reset the neurons of other models during a trace.
    """
    replaced: list[tuple[type, str, list[Any], list[Any]]] = []
    for cls in {base: None for module in copy.root.modules() for base in module.__class__.__mro__}:
        for name, modules in [*vars(cls).items()]:
            if type(modules) is not list or not any(isinstance(m, nn.Module) for m in modules):
                continue
            copies = [copy.copy_of(m) for m in modules if copy.has_copy_of(m) or not _is_reset_by_library(m)]
            replaced.append((cls, name, modules, copies))
    for cls, name, _, copies in replaced:
        setattr(cls, name, [*copies])
    try:
        yield
    finally:
        for cls, name, modules, copies in replaced:
            modules += getattr(cls, name)[len(copies) :]  # modules that another thread made meanwhile
            setattr(cls, name, modules)


def _is_reset_by_library(value: Any) -> bool:
    adapter = adapter_of(value) if isinstance(value, nn.Module) else None
    return getattr(adapter, "is_reset_by_assignment", False)
