"""Chunk plans: how many time steps one chunk of inference runs (strip-mining of the time loop).

Over all T steps, a value takes T times the bytes of one step. In chunks, the net runs fewer steps at a time and carries
the state across chunks; `snnfx.memory.planning` chooses the length. Legal in evaluation mode: no value depends on the
number of steps in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snnfx.errors import InputError
from snnfx.memory.budget import steps_as_text

__all__ = [
    "ChunkPlan",
    "check_chunk_option",
    "plan_chunks",
]


@dataclass(frozen=True)
class ChunkPlan:
    """The chunk length of inference.

    Args:
        length: time steps per chunk, None for all.
        bytes_per_step: bytes that each time step adds at the peak; 0 if unknown.
        budget: bytes that the intermediates of a chunk may take; 0 if the option `chunk` sets the length.
        reason: one line for `explain`.
    """

    length: int | None
    bytes_per_step: int
    budget: int
    reason: str


def check_chunk_option(chunk: Any) -> None:
    """Raise InputError for an invalid value of the option `chunk`."""
    if chunk is None or chunk == "auto":
        return
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise InputError(
            "SNNFX309", f"chunk={chunk!r} is not a chunk length", hint='Use a number of time steps, None, or "auto".'
        )
    if chunk < 1:
        raise InputError("SNNFX302", f"chunk={chunk} is too small", hint="A chunk has at least one time step.")


def plan_chunks(chunk: Any) -> ChunkPlan:
    """The plan for an explicit chunk length; `snnfx.memory.planning` makes the plan for "auto"."""
    if chunk is None:
        return ChunkPlan(None, 0, 0, "chunk = all time steps (set by the option chunk)")
    return ChunkPlan(chunk, 0, 0, f"chunk = {steps_as_text(chunk)} (set by the option chunk)")
