"""Everything that a run of a model can change, remembered and put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from snnfx.sandbox.contents_snapshot import (
    ClassContentsSnapshot,
    ContentsSnapshot,
    python_rng_state,
    restore_python_rng_state,
)
from snnfx.sandbox.torch_internals import FakeTensor

__all__ = ["StateSnapshot", "copy_containers"]


@dataclass
class StateSnapshot:
    """Everything a run of a model can change besides gradients, to be put back afterwards.

    Holds the state of stateful modules, plain attributes, buffers (values), training flags and the random
    number generators. Use as a context manager: `with StateSnapshot.of(model): ...`.
    """

    restore_functions: list[Callable[[], None]]

    @staticmethod
    def of(model: nn.Module) -> StateSnapshot:
        """Take the snapshot of a model and all its submodules."""
        undo: list[Callable[[], None]] = []
        for module in model.modules():
            undo.append(_restorer_of_attributes(module))
        undo.append(ClassContentsSnapshot(model).restore)
        numbers = python_rng_state()
        undo.append(lambda: restore_python_rng_state(numbers))
        rng_state = torch.get_rng_state()
        undo.append(lambda: torch.set_rng_state(rng_state))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            cuda_states = torch.cuda.get_rng_state_all()
            undo.append(lambda: torch.cuda.set_rng_state_all(cuda_states))
        return StateSnapshot(undo)

    def restore(self) -> None:
        """Put everything back."""
        for undo in self.restore_functions:
            undo()

    def __enter__(self) -> StateSnapshot:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _restorer_of_attributes(module: nn.Module) -> Callable[[], None]:
    """Remember a module's `__dict__` with what its containers and objects hold, its registries, and values.

    Values are those of buffers and of tensors in plain attributes, which a step may change in place.
    """
    attributes = {k: v for k, v in module.__dict__.items() if k not in _REGISTRIES}
    held = ContentsSnapshot(attributes)
    registries = {k: dict(module.__dict__[k]) for k in _REGISTRIES}
    plain = [v for v in held.tensors if not isinstance(v, FakeTensor)]
    buffers = [(b, b.detach().clone()) for b in (*module._buffers.values(), *plain) if b is not None]

    def restore() -> None:
        for key in [key for key in module.__dict__ if key not in attributes and key not in _REGISTRIES]:
            del module.__dict__[key]
        module.__dict__.update(attributes)
        held.restore()
        for key, entries in registries.items():
            module.__dict__[key].clear()
            module.__dict__[key].update(entries)
        for buffer, value in buffers:
            # By value: BatchNorm changes its statistics without raising their version. Through `.data`: a graph
            # that has saved the buffer for a backward pass stays usable.
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)

    return restore


def copy_containers(value: Any) -> Any:
    """The same values in new dicts and lists."""
    if type(value) is dict:
        return {k: copy_containers(v) for k, v in value.items()}
    if type(value) is list:
        return [copy_containers(v) for v in value]
    return value
