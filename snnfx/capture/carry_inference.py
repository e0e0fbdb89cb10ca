"""Infer which arguments of a step are its state, for models without `carry=`.

Consider the trailing arguments with default None that `example_inputs` omits. The k of them whose names denote state
(`state`, `hidden`, `mem1`, `h`, `v`, ...) are carried if a step returns a tuple or list of k + 1 elements whose last k
contain tensors: these are their next values, in order. If arguments with other names would fit and the outputs depend
on them, snnfx raises an error that asks for `carry=`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.capture.capture import capture
from snnfx.capture.step_arguments import as_call
from snnfx.capture.unsupported_modules import refuse_unsupported_modules
from snnfx.errors import CaptureError, InputError
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import step_signature
from snnfx.state.carry import OutputPath, split_arguments

__all__ = ["infer_carry"]

_NAMES_OF_STATE = re.compile(
    r".*(state|hidden|mem|syn|spk|spike|potential|carry|voltage|current).*|(prev|last)_.*|.*_(prev|last)|[hcsvuz]x?_?\d*",
    re.IGNORECASE,
)


def infer_carry(model: nn.Module, entry: str, example_inputs: Any) -> dict[str, OutputPath]:
    """Infer the option `carry` by the rule above; empty if no argument is carried.

    Raises:
        InputError: SNNFX314, the assignment of outputs to arguments is ambiguous.
        CaptureError: the model cannot be captured.
    """
    refuse_unsupported_modules(model, entry)
    optional = _optional_arguments(model, entry, example_inputs)
    if not optional:
        return {}
    program = capture(model, example_inputs, entry)
    outputs = pytree.tree_unflatten(list(program.outputs), program.output_spec)
    if not isinstance(outputs, tuple | list):
        return {}
    state_names = [name for name in optional if _NAMES_OF_STATE.fullmatch(name)]
    # Only trailing outputs that contain tensors can be state.
    count = len(outputs) - 1
    contain_tensors = all(any(isinstance(leaf, Node) for leaf in pytree.tree_leaves(value)) for value in outputs[1:])
    if state_names:
        if len(state_names) == count and contain_tensors:
            return {name: (1 + index,) for index, name in enumerate(state_names)}
        if not any(isinstance(leaf, Node) for value in outputs[1:] for leaf in pytree.tree_leaves(value)):
            return {}
        raise _unclear(model, entry, state_names, len(outputs))
    if len(optional) == count and contain_tensors:
        carry: dict[str, OutputPath] = {name: (1 + index,) for index, name in enumerate(optional)}
        if _is_carried(model, entry, example_inputs, carry):
            raise _unclear(model, entry, optional, len(outputs))
    return {}


def _optional_arguments(model: nn.Module, entry: str, example_inputs: Any) -> list[str]:
    """The trailing arguments that default to None and that the example inputs omit."""
    if not callable(getattr(model, entry, None)):
        return []
    parameters = list(step_signature(model, entry).parameters.values())
    given = split_arguments(parameters, [p.name for p in parameters], *as_call(example_inputs))[2]
    names: list[str] = []
    for p in reversed(parameters):
        if p.kind is p.VAR_KEYWORD:
            continue
        if p.kind is p.VAR_POSITIONAL or p.default is not None or given.get(p.name) is not None:
            break
        names.append(p.name)
    return names[::-1]


def _is_carried(model: nn.Module, entry: str, example_inputs: Any, carry: dict[str, OutputPath]) -> bool:
    """Whether the step accepts these outputs as these arguments, and the outputs depend on the arguments."""
    try:
        program = capture(model, example_inputs, entry, carry=carry)
    except CaptureError:
        return False
    for argument in program.carried:
        for slot, node, following in zip(program.slots, program.slot_nodes(), program.next_states, strict=True):
            if slot.name in argument.slot_names() and isinstance(following, Node) and _depends_on(following, node):
                return True
    return False


def _depends_on(node: Node, operand: Node) -> bool:
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is operand:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _unclear(model: nn.Module, entry: str, names: list[str], count: int) -> InputError:
    example = ", ".join(f'"{name}": {index}' for index, name in enumerate(names, 1))
    return InputError(
        "SNNFX314",
        f"the state of {type(model).__name__}.{entry} cannot be inferred",
        why=f"{', '.join(f'`{name}`' for name in names)} may be state, but a step returns {count} values.",
        hint=f"Map each state argument to its output: carry={{{example}}}; pass carry={{}} if none is state.",
    )
