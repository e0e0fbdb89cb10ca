"""Everything that a run of a model can change, remembered and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

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
    """Remember a module's `__dict__` (containers copied one level and deeper), its registries, and values.

    Values are those of buffers and of tensors in plain attributes, which a step may change in place.
    """
    attributes = {k: copy_containers(v) for k, v in module.__dict__.items() if k not in _REGISTRIES}
    originals = dict(module.__dict__)
    registries = {k: dict(module.__dict__[k]) for k in _REGISTRIES}
    plain = [
        v
        for v in pytree.tree_leaves(list(attributes.values()))
        if isinstance(v, Tensor) and not isinstance(v, FakeTensor)
    ]
    buffers = [(b, b.detach().clone()) for b in (*module._buffers.values(), *plain) if b is not None]

    def restore() -> None:
        for key in list(module.__dict__):
            if key not in originals:
                del module.__dict__[key]
        for key, value in attributes.items():
            original = originals[key]
            if isinstance(original, dict | list) and type(original) in (dict, list):
                _refill(original, value)
                module.__dict__[key] = original
            else:
                module.__dict__[key] = value
        for key, entries in registries.items():
            _refill(module.__dict__[key], entries)
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


def _refill(container: Any, content: Mapping[Any, Any] | list[Any]) -> None:
    container.clear()
    if isinstance(content, list):
        container.extend(content)
    else:
        container.update(content)
