"""Operators that run for all time steps at once, and recorded calls as functional calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import (
    AtenCall,
    RecordedValue,
    Recording,
    ValueReference,
    call_as_recorded,
    resolve_references,
)
from snnfx.ops.written_arguments import written_arguments
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "FunctionalCall",
    "calls_in_order",
    "calls_needed_for",
    "product_with_constant",
    "runs_batched",
    "without_leading_ones",
]


def runs_batched(call: AtenCall) -> bool:
    """Whether a call can run for all time steps at once if it does not depend on a state."""
    return call.traits.view == "view" or call.traits.product or call.traits.joins


def product_with_constant(call: AtenCall, values: Sequence[RecordedValue]) -> tuple[int, int, int | None] | None:
    """The values `(left, matrix, bias)` of a product of a varying value with a matrix that is the same at each step."""
    if call.name not in ("mm", "addmm") or call.kwargs:
        return None
    *bias, left, matrix = [a.number for a in call.args]
    if not values[left].varying or any(values[n].varying for n in (*bias, matrix)):
        return None
    return left, matrix, bias[0] if bias else None


def without_leading_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Strip leading dimensions of size 1, which do not matter to element-wise operations."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


def calls_in_order(values: Sequence[RecordedValue]) -> list[AtenCall]:
    """All calls of a recording, in the order of execution."""
    return list({id(v.call): v.call for v in values if v.call is not None}.values())


def calls_needed_for(
    values: Sequence[RecordedValue], wanted: Iterable[int], known: Iterable[int] = ()
) -> list[AtenCall]:
    """The calls that compute the values `wanted` from the values `known`, in order."""
    seen = set(known)
    needed: set[int] = set()
    stack = [number for number in wanted if number not in seen]
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        call = values[number].call
        if call is not None:
            needed.add(id(call))
            stack.extend(call.references())
    return [call for call in calls_in_order(values) if id(call) in needed]


_RESHAPED = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


class FunctionalCall:
    """A recorded call without side effects: an operand that the operator writes in place is copied first.

    Args:
        call: the call.
        wanted: the results to return.
        recording: the recording of the call.
    """

    def __init__(self, call: AtenCall, wanted: Sequence[int], recording: Recording) -> None:
        self.call, self.wanted = call, list(wanted)
        self.target = torch.ops.aten.reshape.default if call.target in _RESHAPED else call.target
        self.written = [position for position, _ in written_arguments(call.target)]
        self.args, self.kwargs = list(call.args), call.kwargs
        names = [a.name for a in call.target._schema.arguments]
        self.positions = [call.positions[call.results.index(number)] for number in self.wanted]
        if "output_mask" in names and names.index("output_mask") < len(self.args):
            position = names.index("output_mask")
            self.args[position] = [i in self.positions for i in range(len(self.args[position]))]
        self._values = [(i, a.number) for i, a in enumerate(self.args) if isinstance(a, ValueReference)]
        self._nested = [
            i
            for i, a in enumerate(self.args)
            if isinstance(a, list | tuple | dict)
            and any(isinstance(leaf, ValueReference) for leaf in pytree.tree_leaves(a))
        ]

    @staticmethod
    def of(call: AtenCall, wanted: Sequence[int], recording: Recording) -> FunctionalCall:
        """The functional call of a call, made once for each recording."""
        key = (id(call), *wanted)
        found: FunctionalCall | None = recording.prepared_calls.get(key)
        if found is None:
            found = recording.prepared_calls[key] = FunctionalCall(call, wanted, recording)
        return found

    def on(self, known: Mapping[int, Any]) -> list[Tensor]:
        """Run the call on known values; return the wanted results."""
        args = list(self.args)
        for position, number in self._values:
            args[position] = known[number]
        for position in self._nested:
            args[position] = resolve_references(args[position], known)
        return self(args, resolve_references(self.kwargs, known) if self.kwargs else self.kwargs)

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """Run the call on arguments; return the wanted results."""
        if self.written:
            args = [a.clone() if i in self.written and isinstance(a, Tensor) else a for i, a in enumerate(args)]
        if len(self.wanted) == 1 or self.call.traits.view == "view":
            results = self.target(*args, **kwargs)
        else:
            results = call_as_recorded(self.target, args, kwargs)
        if isinstance(results, Tensor):
            return [results]
        flat = pytree.tree_leaves(results)
        return [flat[place] for place in self.positions]
