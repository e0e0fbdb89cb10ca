"""The interface of an exported file: its inputs, states and outputs, with their names, shapes and dynamic axes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from snnfx.sandbox.torch_internals import pytree

__all__ = ["START", "FileTensor", "Interface", "named_leaves", "plain_containers", "symbolic_shape", "unique_names"]

START = "start"
"""The input that selects the reset state."""


@dataclass(frozen=True)
class FileTensor:
    """An input, state or output of an exported file.

    Args:
        name: its name in the file.
        shape: its sizes; a dynamic size is the name of an axis, or an expression of it: "T", "N", "4*N".
        dtype: e.g. "float32".
        slot: the slot, for states.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    slot: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the metadata of a file."""
        slot = {"slot": self.slot} if self.slot else {}
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, **slot}


@dataclass(frozen=True)
class Interface:
    """All tensors of an exported file, in the order in which it takes and returns them.

    Args:
        inputs: the inputs of the net.
        states: the states that the file takes.
        outputs: the outputs of the net.
        final_states: the states that the file returns.
        has_start: whether the file takes the bool `start` after the states.
        initial: for each state that the file takes, the number that fills it in the reset state, or None.
    """

    inputs: tuple[FileTensor, ...]
    states: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]
    final_states: tuple[FileTensor, ...]
    has_start: bool = False
    initial: Mapping[str, float | int | bool | None] = field(default_factory=dict)

    @property
    def input_names(self) -> list[str]:
        """The names of all inputs of the file."""
        return [t.name for t in (*self.inputs, *self.states)] + ([START] if self.has_start else [])

    @property
    def output_names(self) -> list[str]:
        """The names of all outputs of the file."""
        return [t.name for t in (*self.outputs, *self.final_states)]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table: kind, name, shape and dtype of each tensor."""
        kinds = (("input", self.inputs), ("state", self.states), ("output", self.outputs))
        rows = [(kind, t.name, f"[{', '.join(map(str, t.shape))}]", t.dtype) for kind, ts in kinds for t in ts]
        if self.has_start:
            rows.insert(len(self.inputs) + len(self.states), ("state", START, "[]", "bool"))
        final = [("final state", t.name, f"[{', '.join(map(str, t.shape))}]", t.dtype) for t in self.final_states]
        return rows + final

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the metadata of a file."""
        return {
            "inputs": [t.to_dict() for t in self.inputs],
            "states": [{**t.to_dict(), "initial": self.initial.get(t.slot)} for t in self.states],
            "outputs": [t.to_dict() for t in self.outputs],
            "final_states": [t.to_dict() for t in self.final_states],
            **({"start": START} if self.has_start else {}),
        }


def plain_containers(value: Any) -> Any:
    """Nested outputs with tuples, lists and dicts only, so that loading them needs no class of the model."""
    if isinstance(value, dict):
        return {key: plain_containers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain_containers(v) for v in value]
    if isinstance(value, tuple):
        return tuple(plain_containers(v) for v in value)
    leaves = pytree.tree_leaves(value)
    return value if len(leaves) == 1 and leaves[0] is value else tuple(leaves) if leaves else value


def named_leaves(value: Any, root: str = "output") -> list[tuple[str, Any]]:
    """The tensors of nested outputs with their names: "output", "output.1", "spikes", "parts.0"."""
    return [(name or root, v) for name, v in _paths(value, "", root) if isinstance(v, Tensor)]


def _paths(value: Any, path: str, root: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items = [(str(key), v) for key, v in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        prefix = path or root
        return [leaf for i, v in enumerate(value) for leaf in _paths(v, f"{prefix}.{i}", root)]
    else:
        return [(path, value)]
    return [leaf for key, v in items for leaf in _paths(v, f"{path}.{key}" if path else key, root)]


def unique_names(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """The names, with a number appended where a name is taken."""
    used, result = set(taken), list[str]()
    for name in names:
        candidate, count = name, 1
        while candidate in used:
            count += 1
            candidate = f"{name}_{count}"
        used.add(candidate)
        result.append(candidate)
    return result


def symbolic_shape(shape: Sequence[Any], axes: Mapping[str, str]) -> tuple[int | str, ...]:
    """A shape with the names of axes for the symbols of a trace: `(s77*s27, 4)` is `("T*N", 4)`."""

    def name(size: Any) -> int | str:
        if isinstance(size, int) and not isinstance(size, torch.SymInt):
            return size
        return re.sub(r"[su]\d+", lambda m: axes.get(m.group(), m.group()), str(size))

    return tuple(map(name, shape))
