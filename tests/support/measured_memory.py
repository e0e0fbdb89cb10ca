"""Measure the memory that a run allocates, as an oracle of the predictions."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from snnfx import neuron

# Without kernels, whose buffers a dispatch mode cannot see, and in the memory format of the model.
OPTIONS: dict[str, Any] = {"lower": None, "memory_format": None, "chunk": None}


def measured(net: nn.Module, x_seq: Tensor, training: bool) -> int:
    """Bytes at the peak of a call, or of a training step."""
    gc.collect()
    with torch.set_grad_enabled(training), AllocatedBytes() as meter:
        y = net(x_seq)
        if training:
            y.sum().backward()
    net.zero_grad()
    return meter.peak


def without_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), neuron.LIFNode(), nn.Linear(7, 6), neuron.ParametricLIFNode(), nn.Linear(6, 2)
    )


def with_statistics(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        neuron.LIFNode(),
        nn.MaxPool2d(2),
        nn.Dropout(dropout),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        neuron.IFNode(),
        nn.Flatten(),
        nn.Linear(8 * 9, 3),
    )


class AllocatedBytes(TorchDispatchMode):
    """The bytes of all living storages that were allocated in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result
