"""How many time steps are run at once in inference (strip-mining of the time loop), and the shapes of a step's state.

Run over all T steps, a value takes T times the bytes of one step; the plan (`snnfx.memory.planning`) takes as many
steps as fit, and the state is handed from chunk to chunk. Legal in evaluation mode: no value depends on the number of
steps that are run together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snnfx.errors import InputError

__all__ = [
    "ChunkPlan",
    "check_chunk_option",
    "plan_chunks",
]


@dataclass(frozen=True)
class ChunkPlan:
    """How many time steps are run at once.

    Args:
        length: steps in a chunk, None for all.
        bytes_per_step: bytes alive at the widest point of one time step; 0 when it is not known.
        budget: bytes that the intermediates of a chunk may take; 0 when the length was given.
        reason: one line for `explain`.
    """

    length: int | None
    bytes_per_step: int
    budget: int
    reason: str


def check_chunk_option(chunk: Any) -> None:
    """Raise for a value that `chunk=` does not take."""
    if chunk is None or chunk == "auto":
        return
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise InputError("SNNFX309", f"chunk={chunk!r}", hint='Give a number of time steps, None, or "auto".')
    if chunk < 1:
        raise InputError("SNNFX302", f"chunk={chunk}", hint="A chunk has at least one time step.")


def plan_chunks(chunk: Any) -> ChunkPlan:
    """The plan of a chunk length that was given; `snnfx.memory.planning` makes one for "auto"."""
    if chunk is None:
        return ChunkPlan(None, 0, 0, "chunk=None: all time steps at once")
    return ChunkPlan(chunk, 0, 0, f"chunk={chunk} as asked for")
