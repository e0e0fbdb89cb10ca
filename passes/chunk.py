"""How many time steps are run at once in inference (strip-mining of the time loop), and the shapes of a step's state.

Run over all T steps, a value takes T times the bytes of one step; the plan (`snnfx.memory.plan`) takes as many steps as
fit, and the state is handed from chunk to chunk. Legal in evaluation mode: no value depends on the number of steps
that are run together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import Node

from snnfx.errors import InputError
from snnfx.isolation import without_cached_casts
from snnfx.passes.region_builder import whole_step
from snnfx.program import StepProgram
from snnfx.state import without_hooks

__all__ = ["ChunkPlan", "check_chunk_option", "plan_chunks", "shapes_of_state"]


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
    """The plan of a chunk length that was given; `snnfx.memory.plan` makes one for "auto"."""
    if chunk is None:
        return ChunkPlan(None, 0, 0, "chunk=None: all time steps at once")
    return ChunkPlan(chunk, 0, 0, f"chunk={chunk} as asked for")


class CarriedState(Exception):
    """The first step needs a state that only the caller has."""


def shapes_of_state(program: StepProgram, steps: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each slot after a step on inputs of these shapes, as far as shapes alone tell.

    Args:
        program: a partitioned program.
        steps: tensors with the shapes of ONE step of the inputs (no values are read).
    """
    program = program.first_step or program
    try:
        _, following = _first_step_of_shapes(program, steps, lambda first, arguments: first(*arguments))
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
        CarriedState,
    ):
        return {}
    pairs = zip(program.slots, following, strict=True)
    return {slot.name: tuple(value.shape) for slot, value in pairs if isinstance(value, Tensor)}


def _first_step_of_shapes(
    program: StepProgram, steps: Sequence[Tensor], run: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Any:
    """Let `run` run the first step on fake tensors: it is given the graph and its arguments."""
    for slot, node, initial in zip(program.slots, program.slot_nodes(), program.initial_values, strict=True):
        if initial is None and node.users:
            raise CarriedState(f"the state {slot.name} is given by the caller, so the bytes of a step are not known")
    slots = [slot.name for slot in program.slots]
    builder = whole_step(program)
    wanted = [v for v in program.outputs if isinstance(v, Node)]
    first = builder.graph_module(wanted, program.next_states, slots, first=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = {n: mode.from_tensor(x, static_shapes=True) for n, x in zip(program.input_nodes(), steps, strict=True)}
    arguments = [
        given[key] if isinstance(key, Node) and key in given else program.resolve(str(getattr(key, "target", key)))
        for key in [*builder.constants, *builder.inputs]
    ]
    # A user's hooks have no business with fake tensors.
    with mode, torch.no_grad(), without_hooks(program.source), without_cached_casts():
        return run(first, arguments)
