"""Inference on sequences of any length, whose inputs come a few steps at a time.

`for y in net.stream(chunks)` holds one chunk, its outputs, and the state: memory does not grow with the steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.errors import InputError
from snnfx.memory.checkpoint_option import refuse_statistics_over_time
from snnfx.runtime.joined_outputs import combine_reductions
from snnfx.sandbox.torch_internals import pytree

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["Stream"]


class Stream(Iterator[Any]):
    """The outputs of a net for inputs that come bit by bit; made by `net.stream`.

    Args:
        net: in step mode "m".
        inputs: what the iterable yields, see `Net.stream`.
        of: "chunks" or "steps".
        state: the state before the first step, None: the reset state, or the one that the net carries.

    Attributes:
        state: after the steps so far, `{"lif1.v": Tensor, ...}`; it can be handed to another run.
        steps: how many time steps there were so far.
    """

    def __init__(self, net: Net, inputs: Iterable[Any], of: str, state: dict[str, Any] | None) -> None:
        if of not in ("chunks", "steps"):
            raise InputError("SNNFX309", f"of={of!r}", hint='Choose "chunks" or "steps".')
        if net.options.step_mode == "s":
            raise InputError("SNNFX309", "a net of single steps has nothing to stream", hint="Call it step by step.")
        if not isinstance(inputs, Iterable):
            what = f"the inputs of a stream are `{_described(inputs)}`"
            raise InputError(
                "SNNFX305", what, hint="Give something that yields them: a generator, a list, a DataLoader."
            )
        if isinstance(inputs, Tensor) and of == "chunks":
            raise InputError(
                "SNNFX309",
                f"the inputs of a stream of chunks are `{_described(inputs)}`",
                why="going through a tensor gives its steps, which are no sequences.",
                hint='Cut it into chunks: net.stream(x_seq.split(16)); or stream steps: of="steps".',
            )
        self.net, self.state, self.steps = net, state, 0
        items = enumerate(inputs)
        self._chunks = self._checked(items) if of == "chunks" else self._gathered(items)
        self._reduced: tuple[Any, ...] | None = None
        self._spec: Any = None

    def __next__(self) -> Any:
        net, carries = self.net, self.net.options.carry_state
        self._refuse_statistics_over_time()
        args, kwargs, T = next(self._chunks)
        # Each chunk is like a call of the net, so a carried state is looked up, and left, every time.
        state = net.carried_state if carries and (self.steps or self.state is None) else self.state
        outputs, self.state = net.run(*args, state=state, T=T, **kwargs)
        if carries:
            net.carried_state = self.state
            net.detach_carried_state()
            self.state = net.carried_state
        before, self.steps = self.steps, self.steps + T
        return outputs if net.options.reduce is None else self._so_far(outputs, before, T)

    def _refuse_statistics_over_time(self) -> None:
        try:
            refuse_statistics_over_time(self.net.program, self.net.training, "net.stream")
        except InputError as error:
            hint = 'Call net.eval() for inference; to train, convert with batch_norm="per_step".'
            raise InputError(error.code, error.what, why=error.why, hint=hint) from None

    def _so_far(self, outputs: Any, before: int, T: int) -> Any:
        """The reduction over all steps so far."""
        flat, self._spec = pytree.tree_flatten(outputs)
        parts = [(T, tuple(flat))] if self._reduced is None else [(before, self._reduced), (T, tuple(flat))]
        self._reduced = combine_reductions(parts, self.net.options.reduce or "mean")
        return pytree.tree_unflatten(list(self._reduced), self._spec)

    def _checked(self, items: Iterator[tuple[int, Any]]) -> Iterator[_Chunk]:
        """Chunks with the number of their steps."""
        for index, item in items:
            arguments = self.net._arguments
            args, kwargs, leaves = self._bound(index, item)
            if not any(arguments.varying):
                raise InputError(
                    "SNNFX310",
                    "no input of this stream carries a time dimension",
                    why="with time_dim=None an input is the same at every step, so chunks have no length.",
                    hint='Stream one item for each step: net.stream(itertools.repeat(x, 100), of="steps").',
                )
            dims = zip(leaves, arguments.tensor_dims, strict=True)
            if any(d is not None and -x.dim() <= d < x.dim() and x.shape[d] == 0 for x, d in dims):
                raise InputError(
                    "SNNFX301",
                    f"item {index} of the stream is `{_described(item)}`",
                    why="it has no time steps.",
                    hint="Leave empty chunks out: net.stream(x for x in chunks if x.numel()).",
                )
            yield args, kwargs, arguments.time_first(leaves, None)[1]

    def _gathered(self, items: Iterator[tuple[int, Any]]) -> Iterator[_Chunk]:
        """Steps put together to chunks of the length that the chunk plan chooses."""
        net, arguments = self.net, self.net._arguments
        steps: Iterator[list[Tensor]] = (self._bound(index, item)[2] for index, item in items)
        first = next(steps, None)
        if first is None:
            return
        sequences = [x.unsqueeze(0) if v else x for x, v in zip(first, arguments.varying, strict=True)]
        with torch.no_grad():
            length = net.chunk_plan(*sequences).length if not net.training else 1
        steps = itertools.chain([first], steps)
        while part := list(itertools.islice(steps, length or _MOST)):
            columns = zip(*part, strict=True)
            joined = [
                _stacked(column, dim) if dim is not None else column[0]
                for column, dim in zip(columns, arguments.tensor_dims, strict=True)
            ]
            args, kwargs = arguments.arguments_of(joined)
            yield ((), {**_named(net, args), **kwargs}, len(part)) if kwargs else (args, {}, len(part))

    def _bound(self, index: int, item: Any) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """The arguments that an item stands for, and the tensors among them.

        Raises:
            InputError: SNNFX305 or 307, it is not what the net takes.
        """
        names = [leaf.name for leaf in self.net.program.input_leaves]
        kwargs = dict(item) if isinstance(item, Mapping) else {}
        several = item if isinstance(item, tuple | list) else (item,)
        args: tuple[Any, ...] = () if isinstance(item, Mapping) else tuple(several)
        try:
            return args, kwargs, self.net._arguments.bind(args, kwargs)
        except InputError as error:
            if any(type(x).__module__ == "numpy" for x in pytree.tree_leaves((args, kwargs))):
                hint = "Make tensors of arrays: net.stream(torch.from_numpy(x) for x in arrays)."
            elif len(args) > len(names):
                hint = "Leave out what the net does not take: net.stream(x for x, label in loader)."
            else:
                hint = "An item is a tensor, a tuple of positional or a dict of keyword arguments."
            if self.net.program.carried:
                hint += " What is carried is given as state=, by its slots."
            what = f"item {index} of the stream is `{_described(item)}`"
            why = f"{error.what}; the net takes ({', '.join(names)})."
            raise InputError(error.code, what, why=why, hint=hint) from None


_Chunk = tuple[tuple[Any, ...], dict[str, Any], int]
"""`(args, kwargs, T)` of a call."""

_MOST = 64
"""Steps in a chunk where the plan takes all there are."""


def _stacked(column: Sequence[Tensor], dim: int) -> Tensor:
    shapes = list(dict.fromkeys(x.shape for x in column))
    if len(shapes) > 1:
        raise InputError(
            "SNNFX303",
            f"steps of the stream have the shapes {' and '.join(str(list(shape)) for shape in shapes)}",
            why="the state of one step is that of the samples of the step before.",
            hint="Yield steps of one shape, with drop_last=True where they come from a DataLoader.",
        )
    return torch.stack(tuple(column), dim)


def _described(item: Any) -> str:
    """The type of something, with what is in it."""
    if item is None:
        return "None"
    name = type(item).__name__
    if isinstance(item, tuple | list):
        return f"{name} ({', '.join(map(_described, item))})"
    if isinstance(item, Mapping):
        return f"{name} ({', '.join(f'{key}: {_described(value)}' for key, value in item.items())})"
    return f"{name} {list(item.shape)}" if hasattr(item, "shape") else name


def _named(net: Net, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((leaf.name for leaf in net.program.input_leaves), args, strict=False))
