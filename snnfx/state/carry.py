"""State that a model takes and returns explicitly: `forward(x, state) -> (y, state)`.

An argument is carried when each step takes it from a fixed position in the outputs of the previous step. Each tensor
in it is a state slot, named after the argument: `mem1`, `state.v`, `state.0.i`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snnfx.errors import InputError
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "CarriedArgument",
    "OutputPath",
    "SlotName",
    "flatten_state",
    "output_at",
    "outputs_without",
    "paths_of",
    "rebuild_state",
    "split_arguments",
    "with_final_state",
    "with_output_at",
]

OutputPath = tuple[Any, ...]
"""A position in nested outputs: a sequence of indices and keys."""


@dataclass(frozen=True)
class SlotName:
    """Placeholder for the value of a slot in the structure of a carried argument."""

    name: str


@dataclass(frozen=True)
class CarriedArgument:
    """One argument of a step that is an output of the previous step.

    Args:
        name: name of the argument.
        path: position of its next value in the outputs of a step.
        structure: the nested value of the argument, with a `SlotName` for each slot.
        required: whether the argument has no default, so the caller must pass an initial value.
    """

    name: str
    path: OutputPath
    structure: Any
    required: bool = False

    def slot_names(self) -> tuple[str, ...]:
        """The names of the slots."""
        return tuple(leaf.name for leaf in pytree.tree_leaves(self.structure) if isinstance(leaf, SlotName))


def paths_of(carry: Mapping[str, Any] | None) -> dict[str, OutputPath]:
    """Normalize the option `carry` to one path per argument: `{"mem": 1}` means `{"mem": (1,)}`.

    Raises:
        InputError: SNNFX309, an entry is neither an index or key nor a tuple of them.
    """
    if carry is None:
        return {}
    if not isinstance(carry, Mapping):
        raise InputError("SNNFX309", f"carry={carry!r} is not a dict", hint='Write carry={"state": 1}.')
    paths = {name: path if isinstance(path, tuple) else (path,) for name, path in carry.items()}
    for name, path in paths.items():
        if not isinstance(name, str) or not path or not all(isinstance(key, int | str) for key in path):
            raise InputError(
                "SNNFX309",
                f"carry={dict(carry)!r} gives no position in the outputs for `{name}`",
                hint='Give an index into the outputs of a step, or a tuple of indices: carry={"state": (1, 0)}.',
            )
    return paths


def output_at(outputs: Any, path: OutputPath) -> Any:
    """Select the part of nested outputs at a path."""
    for key in path:
        outputs = getattr(outputs, key) if isinstance(key, str) and hasattr(outputs, "_fields") else outputs[key]
    return outputs


def with_output_at(outputs: Any, path: OutputPath, value: Any) -> Any:
    """Copy nested outputs and replace the value at a path."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(outputs, Mapping):
        return {k: with_output_at(v, rest, value) if k == key else v for k, v in outputs.items()}
    position = _position(outputs, key)
    elements = [with_output_at(v, rest, value) if i == position else v for i, v in enumerate(outputs)]
    if hasattr(outputs, "_fields"):
        return type(outputs)(*elements)
    return type(outputs)(elements)


def outputs_without(outputs: Any, paths: Sequence[OutputPath]) -> Any:
    """Remove the parts at some paths from nested outputs; unwrap a tuple or list with one element left.

    Example:
        >>> outputs_without(("spikes", "mem1", "mem2"), [(1,), (2,)])
        'spikes'
    """
    if not paths:
        return outputs
    if isinstance(outputs, Mapping):
        inner = {k: [p[1:] for p in paths if p[0] == k] for k in outputs}
        return {k: outputs_without(v, inner[k]) for k, v in outputs.items() if () not in inner[k]}
    by_position: dict[int, list[OutputPath]] = {}
    for path in paths:
        by_position.setdefault(_position(outputs, path[0]), []).append(path[1:])
    inner_paths = [by_position.get(i, []) for i in range(len(outputs))]
    remaining = [outputs_without(v, inner) for v, inner in zip(outputs, inner_paths, strict=True) if () not in inner]
    if len(remaining) == 1:
        return remaining[0]
    return remaining if isinstance(outputs, list) else tuple(remaining)


def _position(outputs: Any, key: Any) -> int:
    """The index of a key in a tuple or list; a string names a field of a named tuple."""
    if isinstance(key, str):
        return int(outputs._fields.index(key))
    return int(range(len(outputs))[key])


def split_arguments(
    parameters: Sequence[inspect.Parameter], carried: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Split the arguments of a call into `(args, kwargs, carried arguments by name)`.

    Positional arguments that follow a carried argument move into kwargs.
    """
    positional_values: list[Any] = []
    named: dict[str, Any] = {}
    state: dict[str, Any] = {}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    after_carried = False
    for index, value in enumerate(args):
        name = positional[index].name if index < len(positional) else None
        if name in carried:
            after_carried = True
            state[str(name)] = value
        elif after_carried and name is not None:
            named[name] = value
        else:
            positional_values.append(value)
    for name, value in kwargs.items():
        (state if name in carried else named)[name] = value
    return tuple(positional_values), named, state


def flatten_state(argument: CarriedArgument, value: Any) -> dict[str, Any]:
    """Flatten the value of a carried argument into slot values by name.

    Raises:
        InputError: SNNFX308, the value and the state of the net are nested differently.
    """
    leaves, spec = pytree.tree_flatten(value)
    names, expected = pytree.tree_flatten(argument.structure)
    if spec != expected or any(leaf is None for leaf, n in zip(leaves, names, strict=True) if isinstance(n, SlotName)):
        raise InputError(
            "SNNFX308",
            f"the structure of the state `{argument.name}` differs from the model's",
            why=f"it is {spec}, but one step returns {expected}.",
            hint="Pass the state that a call returned, or omit the argument to start from the reset state.",
        )
    return {n.name: leaf for n, leaf in zip(names, leaves, strict=True) if isinstance(n, SlotName)}


def rebuild_state(argument: CarriedArgument, state: Mapping[str, Any]) -> Any:
    """Rebuild the nested value of a carried argument from slot values; inverse of `flatten_state`."""
    return pytree.tree_map(lambda leaf: state[leaf.name] if isinstance(leaf, SlotName) else leaf, argument.structure)


def with_final_state(outputs: Any, carried: Sequence[CarriedArgument], state: Mapping[str, Any]) -> Any:
    """Insert the final values of carried arguments into outputs, as the model returns them."""
    for argument in carried:
        outputs = with_output_at(outputs, argument.path, rebuild_state(argument, state))
    return outputs
