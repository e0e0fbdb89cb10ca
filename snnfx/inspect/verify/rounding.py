"""Tell rounding from faults: comparisons of the model that rounding can turn over, and spikes that it flips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from snnfx.inspect.verify.comparison import Tolerance, are_spikes
from snnfx.inspect.verify.divergence import NeuronTrace
from snnfx.sandbox.torch_internals import TorchDispatchMode

__all__ = ["NearThresholds", "flipped_spikes"]

_COMPARISONS = frozenset({"gt", "ge", "lt", "le", "eq", "ne"})
_STEP_FUNCTIONS = frozenset(
    {"sign", "heaviside", "floor", "ceil", "round", "trunc", "relu", "relu_", "hardtanh", "clamp", "threshold_backward"}
)
_SELECTIONS = frozenset({"max_pool2d_with_indices", "max_pool3d_with_indices", "argmax", "argmin", "topk", "sort"})


class NearThresholds(TorchDispatchMode):
    """Counts comparisons of floating-point numbers so close to each other that rounding may decide them.

    Attributes:
        count: the number of such elements.
    """

    def __init__(self, tolerance: Tolerance) -> None:
        super().__init__()
        self.tolerance, self.count = tolerance, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", None)
        name = "" if packet is None else packet.__name__
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
            if name in _COMPARISONS and len(args) > 1:
                self._count(x, args[1])
            elif name in _STEP_FUNCTIONS:
                self._count(x, x.round() if name in ("floor", "ceil", "trunc") else 0.0)
                if name == "round":
                    self._count(x - x.floor(), 0.5)
            elif name in _SELECTIONS and not are_spikes(x):
                self.count += 1
        return func(*args, **(kwargs or {}))

    def _count(self, x: Tensor, other: Any) -> None:
        difference = (x.detach().double() - other).abs()
        finite = x.abs()[x.isfinite()]
        scale = max(float(finite.max()) if finite.numel() else 0.0, float(torch.as_tensor(other).abs().max()))
        # An exact zero is a spike, a mask or a padding, which rounding does not change; ties at a threshold count.
        is_near = difference <= self.tolerance.allowed(x.dtype, scale)
        self.count += int((is_near & ((difference != 0) | (x != 0))).sum())


def flipped_spikes(traces: Mapping[str, NeuronTrace], record: Mapping[str, Any]) -> tuple[int, int]:
    """The number of spikes of the neurons that net and model emit differently, and the number of all: `(k, n)`."""
    flipped = total = 0
    for name, trace in traces.items():
        expected, actual = torch.stack(trace.outputs), record.get(name)
        if isinstance(actual, Tensor) and actual.shape == expected.shape and are_spikes(expected):
            flipped += int((actual != expected).sum())
            total += expected.numel()
    return flipped, total
