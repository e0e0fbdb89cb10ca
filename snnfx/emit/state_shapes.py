"""Infer the shapes of the state from the shapes of the inputs of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.emit.region_builder import whole_step
from snnfx.ir.program import StepProgram
from snnfx.sandbox.isolation import autocast_cache_disabled
from snnfx.sandbox.random_draws import draws_undone
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from snnfx.state.hooks import without_hooks


class CarriedState(Exception):
    """The first step needs an initial state that only the caller can pass."""


def shapes_of_state(program: StepProgram, steps: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each slot after one step on inputs of these shapes.

    Args:
        program: a partitioned program.
        steps: tensors with the shapes of ONE step of the inputs; no values are read.

    Returns:
        The shapes by slot; empty if they depend on values or on a state that only the caller can pass.
    """
    program = program.first_step or program
    try:
        _, next_states = _run_fake_first_step(program, steps)
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
        CarriedState,
    ):
        return {}
    pairs = zip(program.slots, next_states, strict=True)
    return {slot.name: tuple(value.shape) for slot, value in pairs if isinstance(value, Tensor)}


def _run_fake_first_step(program: StepProgram, steps: Sequence[Tensor]) -> Any:
    """Run the first step on fake tensors: `(outputs, next states)`."""
    for slot, node, initial in zip(program.slots, program.slot_nodes(), program.initial_values, strict=True):
        if initial is None and node.users:
            raise CarriedState(f"only the caller can pass the initial state {slot.name}")
    slots = [slot.name for slot in program.slots]
    builder = whole_step(program)
    output_nodes = [v for v in program.outputs if isinstance(v, Node)]
    first = builder.graph_module(output_nodes, program.next_states, slots, first=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_inputs = {
        n: mode.from_tensor(x, static_shapes=True) for n, x in zip(program.input_nodes(), steps, strict=True)
    }
    # Hooks of the user and other threads that call the model must not see fake tensors.
    copier = StructuralCopy(tensor=_private_buffer)
    arguments = [
        fake_inputs[key]
        if isinstance(key, Node) and key in fake_inputs
        else copier.of(program.resolve(str(getattr(key, "target", key))))
        for key in [*builder.constants, *builder.inputs]
    ]
    copies = nn.ModuleList(copied for _, copied in copier.pairs())
    with mode, torch.no_grad(), without_hooks(copies), autocast_cache_disabled(), draws_undone():
        return first(*arguments)


def _private_buffer(tensor: Tensor) -> Tensor:
    """A tensor that the step may change in place, even inside a fake mode, e.g. a count of batches."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
