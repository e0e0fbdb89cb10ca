"""Snapshot of a model by value: find the changes that a pass made to it, and put them back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from snnfx.ir.guards import is_same_tensor
from snnfx.sandbox.contents_snapshot import ContentsSnapshot
from snnfx.sandbox.snapshot import StateSnapshot
from snnfx.sandbox.tensor_snapshot import TensorSnapshot, gradient_of
from snnfx.sandbox.torch_internals import FakeTensor

__all__ = ["ModelSnapshot", "has_other_values", "has_values"]

_REGISTRIES = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "submodule"}


class ModelSnapshot:
    """The parameters, buffers, training flags, submodules and plain attributes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = dict(model.named_modules())
        self._registries = {
            name: {kind: dict(vars(module)[kind]) for kind in _REGISTRIES} for name, module in self._modules.items()
        }
        self._attributes = {
            name: ContentsSnapshot(_plain(module), functions=True) for name, module in self._modules.items()
        }
        named: list[tuple[str, str, Tensor]] = [("parameters", *item) for item in model.named_parameters()]
        named += [("buffers", *item) for item in model.named_buffers()]
        self._tensors = [(kind, name, TensorSnapshot(t)) for kind, name, t in named if has_values(t)]
        self._state = StateSnapshot.of(model, rng=False, functions=True)

    def changes(self) -> Iterator[tuple[str, str]]:
        """The changes since construction: `(kind, clause)`, kinds as in `snnfx.ir.graph_pass.CHANGES`."""
        for kind, name, snapshot in self._tensors:
            tensor = snapshot.tensor
            if has_other_values(snapshot):
                yield kind, f"the value of `{name}`"
            elif tensor.requires_grad != snapshot.requires_grad:
                yield kind, f"`{name}.requires_grad`"
            elif gradient_of(tensor) is not snapshot.grad:
                yield kind, f"the gradient of `{name}`"
        for owner, module in self._modules.items():
            for registry, what in _REGISTRIES.items():
                before, now = self._registries[owner][registry], vars(module)[registry]
                for name in dict.fromkeys((*before, *now)):
                    if before.get(name) is not now.get(name) or (name in before) != (name in now):
                        verb = "added" if name not in before else "removed" if name not in now else "replaced"
                        yield "modules", f"the {verb} {what} `{_joined(owner, name)}`"
            yield from self._attribute_changes(owner, module)

    def _attribute_changes(self, owner: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        snapshot, now = self._attributes[owner], _plain(module)
        for name in dict.fromkeys((*snapshot.values, *now)):
            if name in snapshot.values and name not in now:
                yield "attributes", f"the removed attribute `{_joined(owner, name)}`"
            elif any(True for _ in snapshot.changes(name, now.get(name))):
                kind = "training" if name == "training" else "attributes"
                yield kind, f"`{_joined(owner, name)}`"

    def restore(self) -> None:
        """Put the model back."""
        self._state.restore()
        for _, _, snapshot in self._tensors:
            snapshot.restore()


def _plain(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _REGISTRIES}


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def has_other_values(snapshot: TensorSnapshot) -> bool:
    """Whether a tensor has changed since its snapshot."""
    assert snapshot.value is not None
    return not is_same_tensor(snapshot.tensor.detach(), snapshot.value)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own that can be compared."""
    return not (
        is_lazy(tensor)
        or tensor.is_meta
        or tensor.is_nested
        or tensor.layout != torch.strided
        or isinstance(tensor, FakeTensor)
    )
