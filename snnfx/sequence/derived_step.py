"""Derive the single-step form of a captured call: one loop over the inputs whose values are stacked.

The net then is an ordinary multi-step net: explicit state, streaming, recording, chunks and online rules work. Other
calls keep their graph on whole sequences.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from snnfx.ir.facts import ELEMENT
from snnfx.ir.nodes import is_size, is_structural
from snnfx.ir.program import StepProgram
from snnfx.ops.elements import read_elements, stack_elements
from snnfx.ops.run_loop import run_loop
from snnfx.sequence.call_capture import CapturedCall

__all__ = ["DerivedStep", "derive_step"]


@dataclass(frozen=True)
class DerivedStep:
    """One step of a model that runs over time itself.

    Args:
        program: the step, with the arguments and outputs of the model.
        time_dim: the time dimension of inputs and outputs.
    """

    program: StepProgram
    time_dim: int


def derive_step(call: CapturedCall) -> DerivedStep | None:
    """The single-step form of a call; None if the call does more than run one loop over its inputs."""
    program = call.program
    if len(call.loops) != 1 or call.fixed_length or program.persistent_slots or program.carried:
        return None
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr", "output") and not is_size(n)]
    if any(n.target not in _AROUND_LOOP and not is_structural(n) and not _is_element(n) for n in nodes):
        return None
    (loop,) = (n for n in nodes if n.target is run_loop)
    _, steps, values, _ = loop.args
    step = call.loops[0].program
    placeholders: dict[Node, str] = {}
    dims: set[int] = set()
    for value, leaf in zip(values, step.input_leaves, strict=True):
        source, dim = _whole_sequence(value, steps)
        if source is None or source.op != "placeholder" or source in placeholders:
            return None
        placeholders[source] = str(leaf.placeholder)
        dims.add(dim)
    outputs: list[Any] = []
    for output in program.outputs:
        position, dim = _stacked(output, loop, steps)
        if position is None:
            return None
        outputs.append(step.outputs[position])
        dims.add(dim)
    if len(dims) != 1 or set(program.input_nodes()) != set(placeholders):
        return None
    by_name = {node.name: name for node, name in placeholders.items()}
    leaves = [replace(leaf, placeholder=by_name.get(leaf.placeholder or "")) for leaf in program.input_leaves]
    step = step.copy()
    copies = step.nodes_by_name
    step.set_output([copies[node.name] for node in outputs], step.next_states, step.initial_values)
    derived = replace(
        step,
        input_leaves=leaves,
        input_spec=program.input_spec,
        output_spec=program.output_spec,
        guards=program.guards,
        setting_reads=list(program.setting_reads),
    )
    return DerivedStep(derived, dims.pop())


_AROUND_LOOP = (run_loop, read_elements, stack_elements)


def _is_element(node: Node) -> bool:
    """Whether a node only gives the final value of a state, which the net returns as well."""
    return ELEMENT.is_known(node) and all(user.op == "output" for user in node.users)


def _whole_sequence(value: Any, steps: Any) -> tuple[Node | None, int]:
    """`(tensor, dimension)` of a value with all elements of one dimension, in order."""
    if not isinstance(value, Node) or value.target is not read_elements:
        return None, 0
    source, dim, start, step, count = value.args
    is_whole = (
        (start, step) == (0, 1) and count is steps and isinstance(steps, Node) and steps.target is operator.getitem
    )
    return (source, dim) if is_whole and isinstance(source, Node) else (None, 0)  # type: ignore[return-value]


def _stacked(output: Any, loop: Node, steps: Any) -> tuple[int | None, int]:
    """`(position among the outputs of the loop, dimension)` of an output with the values of all iterations."""
    if not isinstance(output, Node) or output.target is not stack_elements:
        return None, 0
    parts, _, *dim = output.args
    if not isinstance(parts, list | tuple) or len(parts) != 1:
        return None, 0
    source, _ = _whole_sequence(parts[0], steps)
    if source is None or not is_structural(source):
        return None, 0
    values, position = source.args
    if not isinstance(values, Node) or values.args != (loop, 0) or not isinstance(position, int):
        return None, 0
    chosen = dim[0] if dim else output.kwargs.get("dim", 0)
    return position, chosen  # type: ignore[return-value]
