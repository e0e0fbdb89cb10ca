"""Memory of one call in one phase, inference or training, as data: region by region and over the execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snnfx.memory.peak_holders import Holder

__all__ = ["PhaseMemory", "RegionMemory"]


@dataclass(frozen=True)
class RegionMemory:
    """Peak memory in bytes while one region runs.

    Args:
        region: name of the region.
        forward: peak during its forward pass, including tensors that other regions allocated.
        kept: bytes of its tensors that stay allocated for the backward pass when the forward pass ends.
        backward: peak during its backward pass; 0 in inference.
    """

    region: str
    forward: int
    kept: int = 0
    backward: int = 0


@dataclass(frozen=True)
class PhaseMemory:
    """Predicted memory of one inference call or of one training step.

    Args:
        phase: "inference" or "training".
        steps: time steps in one chunk; the chunks of a call run in turn and carry the state.
        reason: why this plan was chosen, as a sentence.
        peak: peak in bytes; 0 when it is unknown.
        region: the region that runs at the peak.
        backward: whether the peak is in the backward pass.
        holders: the tensors allocated at the peak, the largest first.
        regions: the regions in execution order.
        moments: for each call, forward and then backward: its region, whether it is a backward call, and the bytes
            allocated at that moment by the region that made them.
    """

    phase: str
    steps: int
    reason: str
    peak: int = 0
    region: str = ""
    backward: bool = False
    holders: tuple[Holder, ...] = ()
    regions: tuple[RegionMemory, ...] = ()
    moments: tuple[tuple[str, bool, Mapping[str, int]], ...] = ()
