"""Infer the shape and dtype of nodes that a pass added or changed, by running them on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.ir.facts import SHAPE_LIKE, VALUE
from snnfx.ir.nodes import is_module_call, is_size_computation
from snnfx.ir.program import StepProgram

__all__ = ["UNKNOWN", "infer_value", "is_same_shape", "update_values"]

UNKNOWN = object()
"""The value of a node that cannot run on the meta device."""


def infer_value(program: StepProgram, node: Node) -> Any:
    """The value of a node computed from those of its operands, on the meta device; `UNKNOWN` if it cannot be."""
    if not node.op.startswith("call") or is_module_call(node) or getattr(node.target, "snnfx_calls_module", False):
        return UNKNOWN
    operands: dict[Node, Any] = {operand: _operand(program, operand) for operand in node.all_input_nodes}
    if any(value is UNKNOWN for value in operands.values()):
        return UNKNOWN
    args = fx.node.map_arg(node.args, operands.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, operands.__getitem__)
    try:
        with torch.no_grad(), torch.device("meta"):
            if node.op == "call_module":
                module = _meta_module(program.resolve(str(node.target)))
                return UNKNOWN if module is None else module.forward(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # an operation may refuse meta tensors in any way
        return UNKNOWN


def _operand(program: StepProgram, operand: Node) -> Any:
    if operand.op == "get_attr":
        value = program.resolve(str(operand.target))
        return (
            value.detach().to("meta")
            if isinstance(value, Tensor)
            else UNKNOWN
            if isinstance(value, nn.Module)
            else value
        )
    return VALUE.of(operand) if VALUE.is_known(operand) else UNKNOWN


def _meta_module(module: nn.Module) -> nn.Module | None:
    """A copy of a leaf module of torch.nn on the meta device, without hooks; None for other modules."""
    if not type(module).__module__.startswith("torch.nn.modules.") or module._modules:
        return None
    other = copy.copy(module)
    for registry in ("_parameters", "_buffers"):
        tensors = vars(module)[registry]
        other.__dict__[registry] = {k: None if t is None else t.detach().to("meta") for k, t in tensors.items()}
    return other


def is_same_shape(a: Any, b: Any) -> bool:
    """Whether two values have the same structure, shapes and dtypes."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(is_same_shape, a, b))
    return True


def update_values(program: StepProgram, changed: Collection[Node], given: Collection[Node]) -> None:
    """Infer the values of changed nodes, and of the nodes that read them.

    Args:
        program: its nodes get the fact `VALUE`, or lose it if it cannot be inferred.
        changed: the nodes that are new or have other operands.
        given: the changed nodes whose value the pass has set; the verifier checks it.
    """
    dirty = set(changed)
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if node in changed and not SHAPE_LIKE.is_known(node) and is_size_computation(node):
            SHAPE_LIKE.set(node, True)
        if node in given or not (node in dirty or any(operand in dirty for operand in node.all_input_nodes)):
            continue
        value, before = infer_value(program, node), VALUE.of(node)
        if value is UNKNOWN:
            if node in changed:
                VALUE.clear(node)
            continue
        VALUE.set(node, value)
        if before is None or not is_same_shape(before, value):
            dirty.add(node)
        elif node in changed:
            dirty.discard(node)
