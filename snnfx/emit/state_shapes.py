"""Infer the shapes of the state of a step from the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.emit.region_builder import whole_step
from snnfx.ir.program import StepProgram
from snnfx.sandbox.isolation import autocast_cache_disabled
from snnfx.sandbox.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from snnfx.state.hooks import without_hooks


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
    with mode, torch.no_grad(), without_hooks(program.source), autocast_cache_disabled():
        return run(first, arguments)
