"""What a recorded call is: elementwise, a view, or something that PyTorch computes; and which of them allow what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, RecordedValue, Recording, ValueReference, call_as_recorded
from snnfx.sandbox.torch_internals import pytree

__all__ = ["BATCHED", "LINEAR", "VIEWS", "Pure", "calls_behind", "in_order", "resolved", "stripped"]

VIEWS = frozenset(
    "t transpose permute view _unsafe_view reshape _reshape_alias unsqueeze squeeze expand slice select unbind split "
    "split_with_sizes unsafe_split unsafe_chunk chunk narrow detach alias".split()
)
"""Operators whose results lie in the memory of their operand."""

BATCHED = VIEWS | frozenset(("mm", "addmm", "bmm", "convolution", "convolution_backward", "cat", "stack"))
"""Operators that are run for all time steps at once where no state is in the way."""

LINEAR = VIEWS | frozenset(
    "mm bmm sum mean neg mul div add sub clone contiguous _to_copy cat stack select_backward slice_backward "
    "unsqueeze_copy squeeze_copy expand_copy view_copy _weight_norm_interface_backward".split()
)
"""Operators that commute with a sum over time of what they take from above, the rest being constant."""


def stripped(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without leading ones, which mean nothing to what is computed for each element."""
    first = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return tuple(shape[first:])


def in_order(values: Sequence[RecordedValue]) -> list[AtenCall]:
    """All calls of a recording, as they were made."""
    return list({id(v.call): v.call for v in values if v.call is not None}.values())


def calls_behind(values: Sequence[RecordedValue], wanted: Iterable[int], at_hand: Iterable[int] = ()) -> list[AtenCall]:
    """The calls that compute some values from others, in order."""
    seen = set(at_hand)
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
    return [call for call in in_order(values) if id(call) in needed]


def resolved(argument: Any, known: Mapping[int, Any]) -> Any:
    """An argument with what is known in place of references."""
    if isinstance(argument, ValueReference):
        return known[argument.number]
    if isinstance(argument, list | tuple):
        return [resolved(a, known) for a in argument]
    if isinstance(argument, dict):
        return {key: resolved(a, known) for key, a in argument.items()}
    return argument


_RESHAPED = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


class Pure:
    """A call as a function without effect: operators that write into their operand get a copy of it.

    Args:
        call: the call.
        wanted: results that are used.
        recording: that it is from.
    """

    def __init__(self, call: AtenCall, wanted: Sequence[int], recording: Recording) -> None:
        self.call, self.wanted = call, list(wanted)
        self.target = torch.ops.aten.reshape.default if call.target in _RESHAPED else call.target
        schema = call.target._schema
        self.written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.args = list(call.args)
        names = [a.name for a in schema.arguments]
        self.places = [call.places[call.results.index(number)] for number in self.wanted]
        if "output_mask" in names and names.index("output_mask") < len(self.args):
            position = names.index("output_mask")
            self.args[position] = [i in self.places for i in range(len(self.args[position]))]
        self.dtype = [recording.values[number].dtype for number in self.wanted]

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """The wanted results."""
        if self.written:
            args = [a.clone() if i in self.written and isinstance(a, Tensor) else a for i, a in enumerate(args)]
        if len(self.wanted) == 1 or self.call.name in VIEWS:
            results = self.target(*args, **kwargs)
        else:
            results = call_as_recorded(self.target, args, kwargs)
        if isinstance(results, Tensor):
            return [results]
        flat = pytree.tree_leaves(results)
        return [flat[place] for place in self.places]
