"""A loop without iterations: the call has one time step, which runs code of its own in front of the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from snnfx.ir.program import StepProgram
from snnfx.sandbox.rng_states import rng_restorer
from snnfx.sandbox.tensor_snapshot import TensorSnapshot
from snnfx.sandbox.torch_internals import pytree

__all__ = ["run_no_iterations"]

Execute = Callable[[list[Tensor]], tuple[Any, dict[str, Any]]]
"""Runs steps from the initial state: `(outputs over time, final states by slot)`."""


def run_no_iterations(
    program: StepProgram,
    execute: Execute,
    inputs: Sequence[Tensor],
    varying: Sequence[bool],
    given: Mapping[str, Any],
) -> tuple[Any, tuple[Any, ...]]:
    """The outputs, without elements, and the initial states.

    A step on zeros gives the shapes; buffers and generators then have their values from before.

    Args:
        program: the step.
        execute: runs the net of the loop.
        inputs: one tensor for each input of the step, time first.
        varying: for each input, whether it has a time dimension.
        given: states before the first iteration, by slot.
    """
    zeros = [x.detach().new_zeros((1, *x.shape[1:])) if v else x.detach() for x, v in zip(inputs, varying, strict=True)]
    snapshots = [TensorSnapshot(buffer) for buffer in program.source.buffers()]
    restore_generators = rng_restorer()
    try:
        with torch.no_grad():
            outputs, final = execute(zeros)
    finally:
        restore_generators()
        for snapshot in snapshots:
            snapshot.restore()
    elements = [x[0] if v else x for x, v in zip(zeros, varying, strict=True)]
    own = [e if v else x for e, x, v in zip(elements, inputs, varying, strict=True)]
    initial = _InitialValues(program, own)
    states = []
    for slot, value in zip(program.slots, program.initial_values, strict=True):
        state = given[slot.name] if slot.name in given else initial.of(value)
        states.append(_expanded(state, final[slot.name]))
    empty = pytree.tree_map(lambda y: y[:0] if isinstance(y, Tensor) else y, outputs)
    return empty, tuple(states)


class _InitialValues:
    """Computes the values before the first step from the inputs of the step."""

    def __init__(self, program: StepProgram, inputs: Sequence[Tensor]) -> None:
        self._program = program
        self._values: dict[Node, Any] = dict(zip(program.input_nodes(), inputs, strict=True))

    def of(self, value: Any) -> Any:
        """The value of a node, and of its operands; any other value itself."""
        if not isinstance(value, Node):
            return value
        if value not in self._values:
            args, kwargs = map_arg((value.args, value.kwargs), self.of)
            self._values[value] = self._function(value)(*args, **kwargs)
        return self._values[value]

    def _function(self, node: Node) -> Callable[..., Any]:
        if node.op == "call_method":
            return lambda x, *args, **kwargs: getattr(x, str(node.target))(*args, **kwargs)
        if node.op == "get_attr":
            return lambda: self._program.resolve(str(node.target))
        if node.op == "call_module":
            return self._program.resolve(str(node.target))  # type: ignore[no-any-return]
        return node.target  # type: ignore[return-value]


def _expanded(state: Any, like: Any) -> Any:
    """A number or a smaller tensor with the shape and dtype of a state after a step."""
    if not isinstance(like, Tensor) or state is None:
        return state
    if not isinstance(state, Tensor):
        return torch.full_like(like, state)
    return state if state.shape == like.shape else state.expand_as(like)
