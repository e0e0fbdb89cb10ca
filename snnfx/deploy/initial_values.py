"""The numbers that fill the states of the reset state, read from the recorded first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.deploy.exported_module import run_region_graph
from snnfx.deploy.functional_step import functional_step
from snnfx.deploy.refusals import ExportRefused, changes_shape
from snnfx.emit.executable import Executable
from snnfx.emit.region_builder import whole_step
from snnfx.ir.facts import SLOT
from snnfx.sandbox.torch_internals import SymbolicTensors

__all__ = ["filled_initial_values"]


def filled_initial_values(executable: Executable, steps: Sequence[Tensor]) -> dict[str, float | int | bool | None]:
    """The number that each state is filled with before the first step; None if it is not one number.

    Args:
        executable: of a net in step mode "s".
        steps: inputs of one step.
    """
    program = executable.program
    names = [slot.name for slot in program.slots]
    if program.first_step is not None:
        return dict.fromkeys(names)
    found: dict[str, Any] = {}
    initial_of = dict(zip(names, program.initial_values, strict=True))
    for name, initial in initial_of.items():
        found[name] = initial if isinstance(initial, bool | int | float) else None
    nodes = [n for n, name in zip(program.slot_nodes(), names, strict=True) if isinstance(initial_of[name], Node)]
    if nodes:
        found.update(zip([SLOT.of(n) for n in nodes], _fills(executable, nodes, names, steps), strict=True))
    return found


def _fills(executable: Executable, nodes: list[Node], names: list[str], steps: Sequence[Tensor]) -> list[Any]:
    program = executable.program
    builder = whole_step(program)
    start = run_region_graph(builder.graph_module(nodes, program.next_states, names, first=True))
    symbolic = SymbolicTensors()
    fake = dict(zip(program.input_nodes(), [symbolic.like(x, ()) for x in steps], strict=True))

    def initial(*inputs: Tensor) -> list[Tensor]:
        by_node = dict(zip(fake, inputs, strict=True))
        keys = [*builder.constants, *builder.inputs]
        values = [
            by_node[k] if isinstance(k, Node) and k in by_node else program.resolve(str(getattr(k, "target", k)))
            for k in keys
        ]
        return [torch.as_tensor(v) for v in start(*values)[0]]

    try:
        with symbolic, torch.no_grad():
            recorded, _ = functional_step(initial, list(fake.values()), ())
    except ExportRefused as error:
        if changes_shape(error):
            return [None] * len(nodes)
        raise
    return [_fill_of(node) for node in recorded.graph.output_node().args[0]]  # type: ignore[union-attr]


_aten = torch.ops.aten
_ZEROS = (_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default)
_ONES = (_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default)
_FULL = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.new_full.default: 2, _aten.scalar_tensor.default: 0}
_SAME_VALUES = (
    _aten.clone.default,
    _aten.expand.default,
    _aten.view.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.unsqueeze.default,
    _aten._to_copy.default,
    _aten.lift_fresh_copy.default,
)


def _fill_of(node: Any) -> Any:
    while node.target in _SAME_VALUES:
        node = node.args[0]
    if node.target in _ZEROS:
        return 0
    if node.target in _ONES:
        return 1
    value = node.args[_FULL[node.target]] if node.target in _FULL else None
    return value if isinstance(value, bool | int | float) else None
