"""Stream sequences of any length through a net, a few time steps at a time.

`for y in net.stream(chunks)` stores one chunk, its outputs and the state, so memory does not grow with the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.errors import InputError
from snnfx.memory.checkpoint_option import refuse_statistics_over_time
from snnfx.runtime.backward_pass import is_in_backward_pass, refuse_to_carry_state_in_backward
from snnfx.runtime.joined_outputs import combine_reductions
from snnfx.sandbox.torch_internals import pytree

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["Stream"]


class Stream(Iterator[Any]):
    """An iterator over the outputs of a net for streamed inputs; made by `net.stream`.

    Args:
        net: a net in step mode "m".
        inputs: an iterable of chunks or steps, see `Net.stream`.
        of: "chunks" or "steps".
        state: the state before the first step; None: the reset state, or the state that the net carries.

    Attributes:
        state: the state after the time steps so far, `{"lif1.v": Tensor, ...}`; `net.run` accepts it.
        steps: the number of time steps so far.
    """

    def __init__(self, net: Net, inputs: Iterable[Any], of: str, state: dict[str, Any] | None) -> None:
        if of not in ("chunks", "steps"):
            raise InputError("SNNFX309", f"of={of!r} is not a valid value", hint='Choose "chunks" or "steps".')
        if net.options.step_mode == "s":
            what = 'a net with step_mode="s" cannot stream'
            raise InputError("SNNFX309", what, hint='Call it step by step, or convert with step_mode="m".')
        if not isinstance(inputs, Iterable):
            what = f"the inputs of the stream are not iterable: `{_description(inputs)}`"
            raise InputError("SNNFX305", what, hint="Pass a generator, a list or a DataLoader.")
        if isinstance(inputs, Tensor) and of == "chunks":
            raise InputError(
                "SNNFX309",
                f"the inputs of a stream of chunks are one tensor, `{_description(inputs)}`",
                why="iterating over a tensor yields single steps, not chunks.",
                hint='Split it into chunks, net.stream(x_seq.split(16)), or stream steps with of="steps".',
            )
        self.net, self.state, self.steps = net, state, 0
        items = enumerate(inputs)
        self._chunks = self._check_chunks(items) if of == "chunks" else self._stack_steps(items)
        self._reduced: tuple[Any, ...] | None = None
        self._spec: Any = None

    def __next__(self) -> Any:
        net, carries = self.net, self.net.options.carry_state
        if carries and is_in_backward_pass():
            refuse_to_carry_state_in_backward({slot.name for slot in net.program.slots})
        self._refuse_statistics_over_time()
        args, kwargs, T = next(self._chunks)
        # Each chunk reads and updates the carried state of the net, as a call does.
        state = net.carried_state if carries and (self.steps or self.state is None) else self.state
        outputs, self.state = net.run(*args, state=state, T=T, **kwargs)
        if carries:
            net.carried_state = self.state
            net.detach_carried_state()
            self.state = net.carried_state
        before, self.steps = self.steps, self.steps + T
        return outputs if net.options.reduce is None else self._reduce_all(outputs, before, T)

    def _refuse_statistics_over_time(self) -> None:
        try:
            refuse_statistics_over_time(self.net.program, self.net.training, "net.stream")
        except InputError as error:
            hint = 'Call net.eval() for inference; to train, convert with batch_norm="per_step".'
            raise InputError(error.code, error.what, why=error.why, hint=hint) from None

    def _reduce_all(self, outputs: Any, before: int, T: int) -> Any:
        """The reduction over all steps so far."""
        flat, self._spec = pytree.tree_flatten(outputs)
        parts = [(T, tuple(flat))] if self._reduced is None else [(before, self._reduced), (T, tuple(flat))]
        self._reduced = combine_reductions(parts, self.net.options.reduce or "mean")
        return pytree.tree_unflatten(list(self._reduced), self._spec)

    def _check_chunks(self, items: Iterator[tuple[int, Any]]) -> Iterator[_Chunk]:
        """Yield the arguments and number of time steps of each chunk."""
        for index, item in items:
            arguments = self.net._arguments
            args, kwargs, leaves = self._bind_item(index, item)
            if not any(arguments.varying):
                raise InputError(
                    "SNNFX310",
                    "no input of this stream has a time dimension",
                    why="with time_dim=None an input is the same at every step, so chunks have no length.",
                    hint='Stream one item per step: net.stream(itertools.repeat(x, 100), of="steps").',
                )
            dims = zip(leaves, arguments.tensor_dims, strict=True)
            if any(d is not None and -x.dim() <= d < x.dim() and x.shape[d] == 0 for x, d in dims):
                raise InputError(
                    "SNNFX301",
                    f"item {index} of the stream is `{_description(item)}`",
                    why="it has no time steps.",
                    hint="Skip empty chunks: net.stream(x for x in chunks if x.numel()).",
                )
            yield args, kwargs, arguments.time_first(leaves, None)[1]

    def _stack_steps(self, items: Iterator[tuple[int, Any]]) -> Iterator[_Chunk]:
        """Stack steps to chunks of the length that the chunk plan chooses, and yield their arguments."""
        net, arguments = self.net, self.net._arguments
        steps: Iterator[list[Tensor]] = (self._bind_item(index, item)[2] for index, item in items)
        first = next(steps, None)
        if first is None:
            return
        sequences = [x.unsqueeze(0) if v else x for x, v in zip(first, arguments.varying, strict=True)]
        with torch.no_grad():
            length = net.chunk_plan(*sequences).length if not net.training else 1
        steps = itertools.chain([first], steps)
        while part := list(itertools.islice(steps, length or _DEFAULT_CHUNK)):
            columns = zip(*part, strict=True)
            joined = [
                _stack(column, dim) if dim is not None else column[0]
                for column, dim in zip(columns, arguments.tensor_dims, strict=True)
            ]
            args, kwargs = arguments.arguments_of(joined)
            yield ((), {**_by_name(net, args), **kwargs}, len(part)) if kwargs else (args, {}, len(part))

    def _bind_item(self, index: int, item: Any) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        """Bind an item of the stream to the inputs of the net: `(args, kwargs, tensors)`.

        Raises:
            InputError: SNNFX305 or 307, the item does not match the inputs.
        """
        names = [leaf.name for leaf in self.net.program.input_leaves]
        kwargs = dict(item) if isinstance(item, Mapping) else {}
        elements = item if isinstance(item, tuple | list) else (item,)
        args: tuple[Any, ...] = () if isinstance(item, Mapping) else tuple(elements)
        try:
            return args, kwargs, self.net._arguments.bind(args, kwargs)
        except InputError as error:
            if any(type(x).__module__ == "numpy" for x in pytree.tree_leaves((args, kwargs))):
                hint = "Convert arrays to tensors: net.stream(torch.from_numpy(x) for x in arrays)."
            elif len(args) > len(names):
                hint = "Pass only the inputs of the net: net.stream(x for x, label in loader)."
            else:
                hint = "Yield a tensor, a tuple of positional arguments or a dict of keyword arguments."
            if self.net.program.carried:
                hint += " Pass carried arguments with state=, by slot name."
            what = f"item {index} of the stream is `{_description(item)}`"
            why = f"{error.what}; the net takes ({', '.join(names)})."
            raise InputError(error.code, what, why=why, hint=hint) from None


_Chunk = tuple[tuple[Any, ...], dict[str, Any], int]
"""`(args, kwargs, T)` of a call."""

_DEFAULT_CHUNK = 64
"""Steps per chunk if the chunk plan sets no limit."""


def _stack(column: Sequence[Tensor], dim: int) -> Tensor:
    shapes = list(dict.fromkeys(x.shape for x in column))
    if len(shapes) > 1:
        raise InputError(
            "SNNFX303",
            f"steps of the stream differ in shape: {' and '.join(str(list(shape)) for shape in shapes)}",
            why="each step continues from the state of the step before it, for the same samples.",
            hint="Yield steps of one shape; for a DataLoader, set drop_last=True.",
        )
    return torch.stack(tuple(column), dim)


def _description(item: Any) -> str:
    """The type of an item, with its elements and shapes."""
    if item is None:
        return "None"
    name = type(item).__name__
    if isinstance(item, tuple | list):
        return f"{name} ({', '.join(map(_description, item))})"
    if isinstance(item, Mapping):
        return f"{name} ({', '.join(f'{key}: {_description(value)}' for key, value in item.items())})"
    return f"{name} {list(item.shape)}" if hasattr(item, "shape") else name


def _by_name(net: Net, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((leaf.name for leaf in net.program.input_leaves), args, strict=False))
