"""Snapshot of everything that a run of a model can change besides gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from snnfx.sandbox.contents_snapshot import ClassContentsSnapshot, ContentsSnapshot
from snnfx.sandbox.rng_states import rng_restorer
from snnfx.sandbox.tensor_values import restore_value
from snnfx.sandbox.torch_internals import FakeTensor

__all__ = ["ModuleCache", "StateSnapshot", "copy_containers"]


class ModuleCache(nn.Module):
    """Container of modules that calls add and that snapshots leave in place.

    Graphs made at a call refer to these modules for as long as the graphs exist.
    """


@dataclass
class StateSnapshot:
    """Snapshot of a model and of the RNG states; restores them when its context exits.

    It covers the state of stateful modules, plain attributes, buffers (by value), training flags and the random
    number generators. Use it as a context manager: `with StateSnapshot.of(model): ...`.
    """

    restore_functions: list[Callable[[], None]]

    @staticmethod
    def of(model: nn.Module, rng: bool = True, functions: bool = False) -> StateSnapshot:
        """Take the snapshot of a model and all its submodules.

        Args:
            model: the model.
            rng: whether to include the random number generators.
            functions: whether to include the attributes of functions that its attributes store.
        """
        restore_functions: list[Callable[[], None]] = []
        for module in model.modules():
            restore_functions.append(_attribute_restorer(module, functions))
        restore_functions.append(ClassContentsSnapshot(model).restore)
        if rng:
            restore_functions.append(rng_restorer())
        return StateSnapshot(restore_functions)

    def restore(self) -> None:
        """Restore everything."""
        for restore in self.restore_functions:
            restore()

    def __enter__(self) -> StateSnapshot:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _attribute_restorer(module: nn.Module, functions: bool) -> Callable[[], None]:
    """A function that restores a module's attributes, nested contents, registries, and tensor values.

    Tensor values are those of buffers and of tensors in plain attributes, which a step may change in place.
    """
    attributes = {k: v for k, v in module.__dict__.items() if k not in _REGISTRIES}
    contents = ContentsSnapshot(attributes, functions)
    registries = {k: dict(module.__dict__[k]) for k in _REGISTRIES if not isinstance(module, ModuleCache)}
    attribute_tensors = [v for v in contents.tensors if not isinstance(v, FakeTensor)]
    # The values of a nested tensor cannot be compared.
    tensors = [b for b in (*module._buffers.values(), *attribute_tensors) if b is not None and not b.is_nested]
    buffers = [(b, b.detach().clone()) for b in tensors]

    def restore() -> None:
        for key in [key for key in module.__dict__ if key not in attributes and key not in _REGISTRIES]:
            del module.__dict__[key]
        module.__dict__.update(attributes)
        contents.restore()
        for key, entries in registries.items():
            module.__dict__[key].clear()
            module.__dict__[key].update(entries)
        for buffer, value in buffers:
            # By value: BatchNorm changes its statistics without raising their version.
            restore_value(buffer, value)

    return restore


def copy_containers(value: Any) -> Any:
    """Copy nested dicts and lists, but not the values inside them."""
    if type(value) is dict:
        return {k: copy_containers(v) for k, v in value.items()}
    if type(value) is list:
        return [copy_containers(v) for v in value]
    return value
