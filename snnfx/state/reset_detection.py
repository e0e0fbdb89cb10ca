"""Detect that a library reset the neurons of a model from outside, as `snntorch.utils.reset` does.

snnTorch resets all instances of a class at once: it assigns new tensors of zeros to their state buffers. It neither
calls a method of the model nor knows a converted net, which stores its carried state apart from the neurons.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.state.registry import named_stateful
from snnfx.state.stateful import Adapter

__all__ = ["ResetDetection"]


class ResetDetection:
    """Watches the states of the neurons that their library resets by assignment.

    Args:
        model: the model; a converted net steps its neurons without writing their states.
    """

    def __init__(self, model: nn.Module) -> None:
        self._neurons = [(m, a) for _, m, a in named_stateful(model) if getattr(a, "is_reset_by_assignment", False)]
        self._seen = [_references(m, a) for m, a in self._neurons]

    def was_reset(self) -> bool:
        """Whether a neuron was reset since the last call of this method."""
        if not self._neurons or torch.compiler.is_compiling():
            return False
        was_reset = False
        for index, (module, adapter) in enumerate(self._neurons):
            values, seen = adapter.read(module), self._seen[index]
            if any(value is not reference() for value, (reference, _) in zip(values, seen, strict=True)):
                was_reset = was_reset or all(_is_reset(v, *s) for v, s in zip(values, seen, strict=True))
                self._seen[index] = _references(module, adapter)
        return was_reset


def _references(module: nn.Module, adapter: Adapter) -> list[tuple[weakref.ref[Tensor], Any]]:
    """A weak reference to each state, with its dtype and device."""
    return [(weakref.ref(value), (value.dtype, value.device)) for value in adapter.read(module)]


def _is_reset(value: Tensor, reference: weakref.ref[Tensor], kind: Any) -> bool:
    """Whether zeros were assigned; `net.to(...)` assigns tensors too, but of another dtype or device."""
    return value is not reference() and (value.dtype, value.device) == kind and not bool(value.any())
