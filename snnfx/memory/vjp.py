"""The backward pass of a segment: its stages are run again, the last one first, for their vector-Jacobian products.

A stage in chunks goes through its sequence backwards; the gradient of a loop's state is handed from chunk to chunk.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from snnfx.memory.entering import enter
from snnfx.memory.packing import PackedTensor
from snnfx.memory.staging import Key, empty_like, keys_of, steps_of, unpacked

if TYPE_CHECKING:
    from snnfx.memory.recompute import Call

__all__ = ["backward"]


@dataclass
class _Pass:
    """What a backward pass through a segment gathers."""

    found: dict[Any, Tensor]
    frozen: set[Any]
    parameters: list[Tensor]
    of_parameters: list[Tensor | None]


def backward(
    call: Call,
    tensors: Sequence[Any],
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the tensors and of the parameters."""
    segment = call.segment
    env: dict[Node, Any] = dict(zip(segment.placeholders, call.values(tensors), strict=True))
    outside = pytree.tree_leaves([call.keys[node] for node in segment.placeholders])
    keys_of_tensors = [outside[position] for position in call.tensor_positions]
    frozen = {key for key, need in zip(keys_of_tensors, needs, strict=False) if not need}
    found: dict[Any, Tensor] = {}
    output = segment.graph.output_node()
    for key, grad in zip(pytree.tree_leaves(call.keys[output]), grads, strict=True):
        if grad is not None:
            _add(found, key, grad)
    own = [p.detach().requires_grad_(n) for p, n in zip(parameters, needs[len(tensors) :], strict=True)]
    pass_on = _Pass(found, frozen, own, [None] * len(own))
    for node in segment.graph.nodes:
        # What the later stages read is computed once more, without a history.
        if node.target is operator.getitem and node.args[0] in env:
            env[node] = env[node.args[0]][node.args[1]]
        elif node in segment.stages[:-1]:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            with torch.no_grad(), call.as_then(node, own):
                env[node] = call.run(node, args, kwargs)
    for node in reversed(segment.stages):
        env.pop(node, None)
        for user in node.users:
            env.pop(user, None)
        _backward_node(call, node, env, pass_on)
    return [found.get(key) for key in keys_of_tensors], pass_on.of_parameters


def _backward_node(call: Call, node: Node, env: dict[Node, Any], state: _Pass) -> None:
    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
    keys = map_arg((node.args, node.kwargs), call.keys.__getitem__)
    given = [
        state.found.pop(key, None) if isinstance(key, Key) else None for key in pytree.tree_leaves(call.keys[node])
    ]
    if all(g is None for g in given):
        return
    length = call.segment.chunks.get(node.name)
    if length is None:
        _vjp(call, node, args, kwargs, keys, given, state)
    else:
        _vjp_in_chunks(call, node, length, args, dict(kwargs), keys, given, state)


def _vjp(call: Call, node: Any, args: Any, kwargs: Any, keys: Any, given: list[Tensor | None], state: _Pass) -> None:
    """The vector-Jacobian product of one run of a stage; gradients are added up in `state`."""
    values, spec = pytree.tree_flatten((args, kwargs))
    inputs: dict[Any, Tensor] = {}
    entered: dict[Any, Tensor] = {}
    with torch.enable_grad(), call.as_then(node, state.parameters):
        for i, (value, key) in enumerate(zip(values, pytree.tree_leaves(keys), strict=True)):
            if isinstance(value, Tensor | PackedTensor) and isinstance(key, Key):
                if key not in entered:
                    x = unpacked(value).detach()
                    if key not in state.frozen and (x.is_floating_point() or x.is_complex()):
                        inputs[key], x = enter(x)
                    entered[key] = x
                    del x
                values[i] = entered[key]
        args, kwargs = pytree.tree_unflatten(values, spec)
        outputs = pytree.tree_leaves(node.target(*args, **kwargs))
        del values, args, kwargs, entered
    pairs = [
        (get_gradient_edge(y), g) for y, g in zip(outputs, given, strict=True) if g is not None and y.requires_grad
    ]
    del outputs
    parameters = [(i, p) for i, p in enumerate(state.parameters) if p.requires_grad]
    if not pairs or not (inputs or parameters):
        return
    ends = [*inputs.values(), *(p for _, p in parameters)]
    grads = torch.autograd.grad([e for e, _ in pairs], ends, [g for _, g in pairs], allow_unused=True)
    for key, grad in zip(inputs, grads, strict=False):
        if grad is not None:
            _add(state.found, key, grad)
    for (i, _), grad in zip(parameters, grads[len(inputs) :], strict=True):
        if grad is not None:
            before = state.of_parameters[i]
            state.of_parameters[i] = grad if before is None else before + grad


def _vjp_in_chunks(
    call: Call,
    node: Node,
    length: int,
    args: Any,
    kwargs: dict[str, Any],
    keys: Any,
    given: list[Tensor | None],
    state: _Pass,
) -> None:
    """The same in chunks of time steps, from the last one to the first."""
    (key_args, key_kwargs), carries = keys, "state" in kwargs
    outputs = len(call.keys[node][0]) if carries else len(call.keys[node])
    of_outputs, of_state = given[:outputs], given[outputs:]
    T = args[0][0].shape[0]
    totals: dict[Any, Tensor] = {}
    starts = range(0, T, length)
    for number, start in reversed(list(enumerate(starts))):
        x = tuple(steps_of(value, start, start + length) for value in args[0])
        before = call.borders[node][number] if carries else None
        # The state at an inner border is a value of its own; the first one came from outside.
        before_keys = key_kwargs.get("state") if number == 0 else keys_of(before)
        now = {**kwargs, "state": before} if carries else kwargs
        now_keys = (key_args, {**key_kwargs, "state": before_keys} if carries else key_kwargs)
        after = [g[start : start + length] if g is not None else None for g in of_outputs]
        part = _Pass({}, state.frozen, state.parameters, state.of_parameters)
        _vjp(call, node, (x, *args[1:]), now, now_keys, [*after, *of_state], part)
        for key in key_args[0]:
            grad = part.found.pop(key, None)
            if grad is not None and key not in totals:
                totals[key] = empty_like(grad, T)
                totals[key][start + length :] = 0.0  # later chunks gave none
            if key in totals:
                totals[key][start : start + length] = 0.0 if grad is None else grad
        if number == 0:
            carries = False  # the gradient of the first state goes outside
        of_state = [part.found.pop(key, None) for key in pytree.tree_leaves(before_keys)] if carries else []
        for key, grad in part.found.items():
            _add(state.found, key, grad)
    for key, grad in totals.items():
        _add(state.found, key, grad)


def _add(found: dict[Any, Tensor], key: Any, grad: Tensor) -> None:
    found[key] = found[key] + grad if key in found else grad
