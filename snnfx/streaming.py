"""Inference on sequences of any length, whose inputs come a few steps at a time.

`for y in net.stream(chunks)` holds one chunk, its outputs, and the state: memory does not grow with the steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from snnfx.errors import InputError
from snnfx.joined_outputs import combine_reductions
from snnfx.memory.training import refuse_statistics_over_time

if TYPE_CHECKING:
    from snnfx.net import Net

__all__ = ["Stream"]


class Stream(Iterator[Any]):
    """The outputs of a net for inputs that come bit by bit; made by `net.stream`.

    Args:
        net: in step mode "m".
        inputs: what the iterable yields, see `Net.stream`.
        of: "chunks" or "steps".
        state: the state before the first step, None: the reset state.

    Attributes:
        state: after the steps so far, `{"lif1.v": Tensor, ...}`; it can be handed to another run.
        steps: how many time steps there were so far.
    """

    def __init__(self, net: Net, inputs: Iterable[Any], of: str, state: dict[str, Any] | None) -> None:
        if of not in ("chunks", "steps"):
            raise InputError("SNNFX309", f"of={of!r}", hint='Choose "chunks" or "steps".')
        if net.options.step_mode == "s":
            raise InputError("SNNFX309", "a net of single steps has nothing to stream", hint="Call it step by step.")
        self.net, self.state, self.steps = net, state, 0
        self._chunks = iter(inputs) if of == "chunks" else self._gathered(iter(inputs))
        self._reduced: tuple[Any, ...] | None = None
        self._spec: Any = None

    def __next__(self) -> Any:
        refuse_statistics_over_time(self.net.program, self.net.training, "net.stream")
        args, kwargs = _arguments(next(self._chunks))
        T = self._length(args, kwargs)
        outputs, self.state = self.net.run(*args, state=self.state, **kwargs)
        before, self.steps = self.steps, self.steps + T
        return outputs if self.net.options.reduce is None else self._so_far(outputs, before, T)

    def _so_far(self, outputs: Any, before: int, T: int) -> Any:
        """The reduction over all steps so far."""
        flat, self._spec = pytree.tree_flatten(outputs)
        parts = [(T, tuple(flat))] if self._reduced is None else [(before, self._reduced), (T, tuple(flat))]
        self._reduced = combine_reductions(parts, self.net.options.reduce or "mean")
        return pytree.tree_unflatten(list(self._reduced), self._spec)

    def _length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        arguments = self.net._arguments
        return arguments.time_first(arguments.bind(args, dict(kwargs)), None)[1]

    def _gathered(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Steps put together to chunks of the length that the chunk plan chooses."""
        net, arguments = self.net, self.net._arguments
        first = next(steps, None)
        if first is None:
            return
        leaves = arguments.bind(*_arguments(first))
        sequences = [x.unsqueeze(0) if v else x for x, v in zip(leaves, arguments.varying, strict=True)]
        with torch.no_grad():
            length = net.chunk_plan(*sequences).length if not net.training else 1
        steps = itertools.chain([first], steps)
        while part := list(itertools.islice(steps, length or _MOST)):
            columns = zip(*(arguments.bind(*_arguments(step)) for step in part), strict=True)
            joined = [
                torch.stack(column, dim) if dim is not None else column[0]
                for column, dim in zip(columns, arguments.tensor_dims, strict=True)
            ]
            args, kwargs = arguments.arguments_of(joined)
            yield {**_named(net, args), **kwargs} if kwargs else args


_MOST = 64
"""Steps in a chunk where the plan takes all there are."""


def _arguments(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), dict(item)
    return tuple(item), {}


def _named(net: Net, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((leaf.name for leaf in net.program.input_leaves), args, strict=False))
