"""Infer the shape and dtype of nodes that a pass added or changed, by running them on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.ir.facts import SHAPE_LIKE, VALUE
from snnfx.ir.nodes import descendants, is_module_call, is_size_computation
from snnfx.ir.program import StepProgram
from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.random_draws import draws_undone
from snnfx.sandbox.torch_internals import pytree

__all__ = ["UNKNOWN", "failure_on_numbers", "infer_value", "is_same_shape", "update_values"]

UNKNOWN = object()
"""The value of a node that cannot run on the meta device."""


def infer_value(program: StepProgram, node: Node, failures: dict[Node, Exception] | None = None) -> Any:
    """The value of a node computed from those of its operands, on the meta device; `UNKNOWN` if it cannot be.

    Args:
        program: the program.
        node: a node of it.
        failures: gets the error if the run fails.
    """
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
    except Exception as error:  # an operation may refuse meta tensors in any way
        if failures is not None:
            failures[node] = error
        return UNKNOWN


def failure_on_numbers(program: StepProgram, node: Node) -> Exception | None:
    """The error of a node in a run on random operands of their shapes; None if it runs, or has operands elsewhere.

    An operation that refuses meta tensors may run on numbers, so only this error shows that operands do not fit.
    """
    operands: dict[Node, Any] = {}
    for operand in node.all_input_nodes:
        value = program.resolve(str(operand.target)) if operand.op == "get_attr" else VALUE.of(operand)
        with draws_undone():
            operands[operand] = pytree.tree_map(_numbers_like, value)
    module = program.resolve(str(node.target)) if node.op == "call_module" else None
    tensors = [leaf for leaf in pytree.tree_leaves([*operands.values()]) if isinstance(leaf, Tensor)]
    if module is not None:
        tensors += [*module.parameters(), *module.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    args = fx.node.map_arg(node.args, operands.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, operands.__getitem__)
    with torch.no_grad(), draws_undone(), isolated(*([] if module is None else [module]), rng=False):
        try:
            if module is not None:
                module.forward(*args, **kwargs)
            elif node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # an operation may fail in any way
            return error
    return None


def _numbers_like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_meta:
        return value.detach().clone()
    like = torch.zeros(value.shape, dtype=value.dtype)
    return like.uniform_() if like.is_floating_point() else like


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


def update_values(program: StepProgram, changed: Collection[Node], given: Collection[Node]) -> dict[Node, Exception]:
    """Infer the values of changed nodes, and of the nodes that read them.

    Args:
        program: its nodes get the fact `VALUE`, or lose it if it cannot be inferred.
        changed: the nodes that are new or have other operands.
        given: the changed nodes whose value the pass has set; the verifier checks it.

    Returns:
        The nodes that fail on the meta device, with their errors, but for those that depend on a state.
    """
    dirty, failures = set(changed), dict[Node, Exception]()
    reshaped, states = set[Node](), descendants(program.slot_nodes()) if program.slots else set()
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if node in changed and not SHAPE_LIKE.is_known(node) and is_size_computation(node):
            SHAPE_LIKE.set(node, True)
        if node in given or not (node in dirty or any(operand in dirty for operand in node.all_input_nodes)):
            continue
        value, before = infer_value(program, node, failures), VALUE.of(node)
        if value is UNKNOWN:
            if any(operand in reshaped for operand in node.all_input_nodes):
                reshaped.add(node)
            if node in changed or node in reshaped:
                VALUE.clear(node)
            continue
        VALUE.set(node, value)
        if before is not None and not is_same_shape(before, value):
            reshaped.add(node)
        if before is None or not is_same_shape(before, value):
            dirty.add(node)
        elif node in changed:
            dirty.discard(node)
    # The recorded shape of a state is that before the pass.
    return {node: error for node, error in failures.items() if node not in states}
