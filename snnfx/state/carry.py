"""State that a model takes and returns explicitly: `forward(x, state) -> (y, state)`.

An argument is carried when one step takes what the step before returned at a certain place of its outputs. Each tensor
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
"""Where something is in nested outputs: the indices and keys that lead to it."""


@dataclass(frozen=True)
class SlotName:
    """Stands for the value of a slot in the structure of a carried argument."""

    name: str


@dataclass(frozen=True)
class CarriedArgument:
    """One argument of a step that is an output of the step before.

    Args:
        name: the argument.
        path: where its next value is in the outputs of a step.
        structure: its value, nested as the model nests it, with a `SlotName` for each slot.
        required: it has no value before the first step, so the caller has to give one.
    """

    name: str
    path: OutputPath
    structure: Any
    required: bool = False

    def slot_names(self) -> tuple[str, ...]:
        """The names of its slots."""
        return tuple(leaf.name for leaf in pytree.tree_leaves(self.structure) if isinstance(leaf, SlotName))


def paths_of(carry: Mapping[str, Any] | None) -> dict[str, OutputPath]:
    """The option `carry` with a path for each argument: `{"mem": 1}` is short for `{"mem": (1,)}`.

    Raises:
        InputError: SNNFX309, an entry is neither an index or key nor a tuple of them.
    """
    if carry is None:
        return {}
    if not isinstance(carry, Mapping):
        raise InputError("SNNFX309", f"carry={carry!r} is no dict", hint='Write carry={"state": 1}.')
    paths = {name: path if isinstance(path, tuple) else (path,) for name, path in carry.items()}
    for name, path in paths.items():
        if not isinstance(name, str) or not path or not all(isinstance(key, int | str) for key in path):
            raise InputError(
                "SNNFX309",
                f"carry={dict(carry)!r} does not say where `{name}` is in the outputs",
                hint='Give an index into what a step returns, or a tuple of indices: carry={"state": (1, 0)}.',
            )
    return paths


def output_at(outputs: Any, path: OutputPath) -> Any:
    """The part of nested outputs at a path."""
    for key in path:
        outputs = getattr(outputs, key) if isinstance(key, str) and hasattr(outputs, "_fields") else outputs[key]
    return outputs


def with_output_at(outputs: Any, path: OutputPath, value: Any) -> Any:
    """A copy of nested outputs with another value at a path."""
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
    """Nested outputs without the parts at some paths; a tuple or list of which one element is left is that element.

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
    inside = [by_position.get(i, []) for i in range(len(outputs))]
    kept = [outputs_without(v, below) for v, below in zip(outputs, inside, strict=True) if () not in below]
    if len(kept) == 1:
        return kept[0]
    return kept if isinstance(outputs, list) else tuple(kept)


def _position(outputs: Any, key: Any) -> int:
    """The index that a key means in a tuple or list; the name of a field is a key as well."""
    if isinstance(key, str):
        return int(outputs._fields.index(key))
    return int(range(len(outputs))[key])


def split_arguments(
    parameters: Sequence[inspect.Parameter], carried: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Part the arguments of a call into `(args, kwargs, carried ones by name)`.

    What is given by position behind a carried argument moves into kwargs.
    """
    kept: list[Any] = []
    named: dict[str, Any] = {}
    state: dict[str, Any] = {}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    passed = False
    for index, value in enumerate(args):
        name = positional[index].name if index < len(positional) else None
        if name in carried:
            passed = True
            state[str(name)] = value
        elif passed and name is not None:
            named[name] = value
        else:
            kept.append(value)
    for name, value in kwargs.items():
        (state if name in carried else named)[name] = value
    return tuple(kept), named, state


def flatten_state(argument: CarriedArgument, value: Any) -> dict[str, Any]:
    """The slots of a carried argument and their values, from the argument as the model takes it.

    Raises:
        InputError: SNNFX308, the value is nested in another way than the state of the net.
    """
    leaves, spec = pytree.tree_flatten(value)
    names, expected = pytree.tree_flatten(argument.structure)
    if spec != expected or any(leaf is None for leaf, n in zip(leaves, names, strict=True) if isinstance(n, SlotName)):
        raise InputError(
            "SNNFX308",
            f"the state `{argument.name}` is nested in another way than the model's",
            why=f"it is {spec}, and one step returns {expected}.",
            hint="Pass on what a call returned, or leave the argument out to start from the reset state.",
        )
    return {n.name: leaf for n, leaf in zip(names, leaves, strict=True) if isinstance(n, SlotName)}


def rebuild_state(argument: CarriedArgument, state: Mapping[str, Any]) -> Any:
    """The argument as the model takes it, from the values of its slots."""
    return pytree.tree_map(lambda leaf: state[leaf.name] if isinstance(leaf, SlotName) else leaf, argument.structure)


def with_final_state(outputs: Any, carried: Sequence[CarriedArgument], state: Mapping[str, Any]) -> Any:
    """What the model returns: outputs with the final values of what is carried in their places."""
    for argument in carried:
        outputs = with_output_at(outputs, argument.path, rebuild_state(argument, state))
    return outputs
