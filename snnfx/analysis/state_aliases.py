"""Stateful calls that return the very tensor that they keep as their state, as a read-out gives its potential.

Whoever changes such an output in place changes the state. In the step graph the output and the next state are two
nodes; where an operation in place follows, they are made one, so that what is done to the one is done to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.errors import CaptureError
from snnfx.ir.nodes import is_structural
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import StepProgram
from snnfx.sandbox.snapshot import StateSnapshot
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.composite_adapter import composite_adapter
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_opaque, call_stateful

__all__ = ["is_output_of_stateful_call", "unite_output_with_state"]


def is_output_of_stateful_call(node: Node) -> bool:
    """Whether the node is what a stateful module returns, not its state."""
    source = node.args[0] if node.args else None
    is_stateful = isinstance(source, Node) and source.target in (call_stateful, call_opaque)
    return is_stateful and is_structural(node) and bool(node.args[1] == 0)


def unite_output_with_state(program: StepProgram, output: Node, change: Node) -> None:
    """Make an output that is the state, and that `change` changes in place, one node with the next state.

    Raises:
        CaptureError: SNNFX214, whether they share memory is not known, or they share it otherwise.
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
            f"`{change.name}` changes a value in place that may be the state of `{describe_node(call)}`",
            where=location_of(change),
            why="then it would change what the module remembers, too.",
            hint="Use the form that is not in place (inplace=False), or change a copy: x = x.clone().",
        )
    for state in states:
        for node in list(state.users):
            if is_structural(node) and node.args[1] in shared:
                node.replace_all_uses_with(output)
                program.graph.erase_node(node)


def _slots_in_output(program: StepProgram, call: Node) -> set[int] | None:
    """The slots whose values are the output itself, found by two steps on zeros; None where that is not known."""
    module = program.module_of(call)
    assert module is not None
    adapter = composite_adapter(module) if call.target is call_opaque else adapter_of(module)
    assert adapter is not None
    unknown = torch.zeros(2, 3) if adapter.elementwise(module) else None
    inputs = pytree.tree_map_only(Node, lambda n: _zeros(n.meta.get("val"), unknown), list(call.args[2:]))
    options = pytree.tree_map_only(Node, lambda n: _zeros(n.meta.get("val"), unknown), dict(call.kwargs))
    if any(leaf is None for leaf in pytree.tree_leaves((inputs, options), is_leaf=lambda leaf: leaf is None)):
        return None
    with StateSnapshot.of(module), torch.no_grad():
        adapter.reset(module)
        try:
            for _ in range(2):
                # Not a pure step: it may copy what a call does not.
                output = nn.Module.__call__(module, *inputs, **options)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None  # zeros of these shapes are no input for it
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
