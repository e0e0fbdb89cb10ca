"""Count the spikes of one layer of neurons, and keep the values of a few of its units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from snnfx.inspect.profile.product_counts import is_binary

__all__ = ["RecordedUnits", "SpikeCounts"]

_MOST_UNITS = 64


@dataclass
class SpikeCounts:
    """Spikes of the output of a loop; it belongs to spiking neurons if it only contains 0 and 1.

    Args:
        name: qualified name of the layer.
        region: the region that runs it.
        shape: shape of one time step, `[N, C, *]`.
        binary: whether all values so far are 0 or 1.
        per_step: spikes of each time step.
        per_channel: spikes of each channel (dimension 1 of one step).
    """

    name: str
    region: str
    shape: tuple[int, ...] = ()
    binary: bool = True
    per_step: list[int] = field(default_factory=list)
    per_channel: Tensor | None = None

    def add(self, sequence: Any) -> None:
        """Add time steps, `[k, N, C, *]`."""
        self.binary = self.binary and isinstance(sequence, Tensor) and sequence.dim() > 1 and is_binary(sequence)
        if not self.binary:
            return
        self.shape = tuple(sequence.shape[1:])
        fired = sequence != 0
        self.per_step += fired.flatten(1).sum(1).tolist()
        channels = fired.transpose(0, 2).flatten(1).sum(1) if fired.dim() > 2 else fired.sum().reshape(1)
        channels = channels.to("cpu", torch.int64)
        self.per_channel = channels if self.per_channel is None else self.per_channel + channels

    @property
    def values_per_step(self) -> int:
        """The number of neurons times the batch size."""
        return torch.Size(self.shape).numel()


@dataclass
class RecordedUnits:
    """Values over time of sample 0 and up to 64 of its units, evenly spread.

    Args:
        name: qualified name of a module or slot.
        units: number of units of one sample.
        binary: whether all values of all samples are 0 or 1.
        values: `[T, unit]`, in parts.
    """

    name: str
    units: int = 0
    binary: bool = True
    values: list[Tensor] = field(default_factory=list)

    def add(self, sequence: Any) -> None:
        """Add time steps, `[k, N, *]`; values without a batch dimension are ignored."""
        if not isinstance(sequence, Tensor) or sequence.dim() < 2:
            return
        self.binary = self.binary and is_binary(sequence)
        units = sequence[:, 0].flatten(1)
        self.units = units.shape[1]
        spread = torch.linspace(0, self.units - 1, min(self.units, _MOST_UNITS)).round().long()
        self.values.append(units[:, spread.to(units.device)].double().cpu())
