"""State aliases: outputs of stateful calls that share memory with the state.

A readout may return its potential itself, so an in-place operation on the output also changes the state. In the step
graph, output and next state are two nodes; if an in-place operation follows, they are merged into one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.errors import CaptureError
from snnfx.ir.facts import VALUE
from snnfx.ir.nodes import is_structural
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import StepProgram
from snnfx.sandbox.random_draws import refusing_draws
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.composite_adapter import composite_adapter
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_opaque, call_stateful

__all__ = ["is_output_of_stateful_call", "unite_output_with_state"]


def is_output_of_stateful_call(node: Node) -> bool:
    """Whether the node is the output of a stateful module, as opposed to its next state."""
    source = node.args[0] if node.args else None
    is_stateful = isinstance(source, Node) and source.target in (call_stateful, call_opaque)
    return is_stateful and is_structural(node) and bool(node.args[1] == 0)


def unite_output_with_state(program: StepProgram, output: Node, change: Node) -> None:
    """Merge an output that `change` modifies in place with the next states that share its memory.

    Raises:
        CaptureError: SNNFX214, it is unknown whether they share memory, or they share it in part.
    """
    call = output.args[0]
    assert isinstance(call, Node)
    states = [node for node in call.users if node is not output and is_structural(node) and node.args[1] == 1]
    if not states:
        return
    shared = _slots_in_output(program, call)
    if shared is None:
        raise CaptureError(
            "SNNFX214",
            f"`{change.name}` changes a tensor in place that may be the state of `{describe_node(call)}`",
            where=location_of(change),
            why="the state of the module would change as well.",
            hint="Use the out-of-place form (inplace=False), or change a copy: x = x.clone().",
        )
    for state in states:
        for node in list(state.users):
            if is_structural(node) and node.args[1] in shared:
                node.replace_all_uses_with(output)
                program.graph.erase_node(node)


def _slots_in_output(program: StepProgram, call: Node) -> set[int] | None:
    """Indices of the slots that share the memory of the output, found by two steps on zeros; None if unknown."""
    module = program.module_of(call)
    assert module is not None
    adapter = composite_adapter(module) if call.target is call_opaque else adapter_of(module)
    assert adapter is not None
    unknown = torch.zeros(2, 3) if adapter.elementwise(module) else None
    inputs = pytree.tree_map_only(Node, lambda n: _zeros(VALUE.of(n), unknown), list(call.args[2:]))
    options = pytree.tree_map_only(Node, lambda n: _zeros(VALUE.of(n), unknown), dict(call.kwargs))
    if any(leaf is None for leaf in pytree.tree_leaves((inputs, options), is_leaf=lambda leaf: leaf is None)):
        return None
    # On a copy with its own state: other threads use the module meanwhile.
    module = StructuralCopy(tensor=lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone()).of(module)
    adapter = composite_adapter(module) if call.target is call_opaque else adapter_of(module)
    assert adapter is not None
    with refusing_draws(), torch.no_grad():
        adapter.reset(module)
        try:
            for _ in range(2):
                # Not a pure step, which may copy tensors that a call does not.
                output = nn.Module.__call__(module, *inputs, **options)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None  # the module does not accept zeros of these shapes
        states = adapter.read(module)
    if not isinstance(output, Tensor):
        return None
    shared = {i for i, value in enumerate(states) if isinstance(value, Tensor) and _share(value, output)}
    whole = all(states[i].shape == output.shape and states[i].stride() == output.stride() for i in shared)
    return shared if whole else None


def _zeros(value: Any, unknown: Tensor | None) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    return unknown if value is None else value


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
