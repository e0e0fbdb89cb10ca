"""Choose how many time steps to run at once in inference (strip-mining of the time loop).

Run over all T steps, a value takes T times the bytes of one step. The plan counts the bytes that are alive at the
widest point of one step and takes as many steps as fit the budget; the state is handed from chunk to chunk. Legal in
evaluation mode, where no value depends on the number of steps that are run together.
"""

from __future__ import annotations

import os
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
from torch.utils import _pytree as pytree

from snnfx.errors import InputError
from snnfx.passes.region_builder import whole_step
from snnfx.program import StepProgram
from snnfx.state import without_hooks

__all__ = ["ChunkPlan", "check_chunk_option", "plan_chunks", "shapes_of_state"]

_CPU_BUDGET = 64 * 2**20
"""Bytes of live intermediates on a CPU. Measured on a convolutional SNN (`tools/bench_csnn.py`): with more, large
blocks come from fresh pages each time and page faults dominate; with less, the calls do."""


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


def plan_chunks(program: StepProgram, steps: Sequence[Tensor], chunk: int | str | None) -> ChunkPlan:
    """Plan the chunks of an evaluation program.

    Args:
        program: the program of evaluation mode.
        steps: tensors with the shapes of ONE step of the inputs (no values are read).
        chunk: the option of `snnfx.convert`.
    """
    if chunk is None:
        return ChunkPlan(None, 0, 0, "chunk=None: all time steps at once")
    if isinstance(chunk, int):
        return ChunkPlan(chunk, 0, 0, f"chunk={chunk} as asked for")
    try:
        needed = live_bytes_per_step(program.first_step or program, steps)
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
        CarriedState,
    ) as error:
        if isinstance(error, CarriedState):
            return ChunkPlan(None, 0, 0, f"all time steps at once: {error}")
        return ChunkPlan(None, 0, 0, "all time steps at once: the bytes of a step depend on the values of tensors")
    budget = _budget(steps[0].device if steps else torch.device("cpu"))
    length = max(1, budget // max(1, needed))
    reason = f"{_bytes(needed)} alive per time step, budget {_bytes(budget)}: {length} steps at once"
    return ChunkPlan(length, needed, budget, reason)


class CarriedState(Exception):
    """The first step needs a state that only the caller has."""


def live_bytes_per_step(program: StepProgram, steps: Sequence[Tensor]) -> int:
    """The bytes alive at the widest point of the first step, from shapes alone.

    Raises:
        CarriedState: the step cannot start without a state of the caller's.
    """
    meter: _LiveBytes | None = None

    def measured(first: fx.GraphModule, arguments: Sequence[Any]) -> Any:
        nonlocal meter
        meter = _LiveBytes(first)
        return meter.run(*arguments)

    _first_step_of_shapes(program, steps, measured)
    assert meter is not None
    return meter.peak


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
    with mode, torch.no_grad(), without_hooks(program.source):
        return run(first, arguments)


class _LiveBytes(fx.Interpreter):
    """Runs a graph on fake tensors and keeps the largest sum of bytes alive; views of a live tensor count once."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.peak = 0
        self.held: dict[Node, dict[int, int]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "placeholder":
            self.held[n] = {
                id(t.untyped_storage()): t.untyped_storage().nbytes()
                for t in pytree.tree_leaves(result)
                if isinstance(t, Tensor)
            }
        alive: dict[int, int] = {}
        for storages in self.held.values():
            alive.update(storages)
        self.peak = max(self.peak, sum(alive.values()))
        for dead in self.user_to_last_uses.get(n, ()):
            self.held.pop(dead, None)
        return result


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 4
    return min(_CPU_BUDGET, _available_memory() // 4)


def _available_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 * _CPU_BUDGET


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
