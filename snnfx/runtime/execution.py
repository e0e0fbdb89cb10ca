"""Runs the inputs of a call through the graphs of a net: all steps at once, in chunks, or the first step by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.errors import InputError, warn_once
from snnfx.functional import chunk_multi_step_forward
from snnfx.runtime.joined_outputs import JoinedOutputs, JoinedReductions, combine_reductions
from snnfx.runtime.replanning import net_for
from snnfx.sandbox.torch_internals import pytree

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["run_sequence", "run_step"]

State = dict[str, Any]
Flat = tuple[Any, ...]
"""Outputs, or values that are recorded, as a graph returns them."""


def run_sequence(
    net: Net, leaves: list[Tensor], given: State, state: State | None, record: tuple[str, ...], T: int
) -> tuple[Any, State, Flat]:
    """Run T steps: `(outputs, final state, recorded values)`; a net that is planned for these shapes does.

    Args:
        net: in step mode "m".
        leaves: the tensors of the inputs, time first.
        given: carried arguments, by name.
        state: before the first step, None: the reset state.
        record: what to record, by name.
        T: the number of time steps.
    """
    other = net_for(net, leaves, given)
    if other is not None:
        return run_sequence(other, leaves, given, state, record, T)
    arguments = net._arguments
    arguments.check_state(state)
    if state is not None:
        arguments.check_shapes(state, arguments.at_step(leaves, 0))
    state = arguments.first_state(state, given)
    records: Flat = ()
    k = net._plans.chunk_length(leaves, T, state)
    checkpoint = None if record else net._plans.checkpoint_length(leaves, T, state)
    if record and net._recomputation.applies():
        told = "checkpoint= and memory_budget= are not looked at in a call with record="
        warn_once("SNNFX508", f"{told}: what is recorded has a history of its own, and all of it is kept.")
    if k is not None:
        flat, state, records = _in_chunks(net, k, leaves, state, T, record)
    elif checkpoint is not None:
        flat, state, _ = _in_chunks(net, checkpoint, leaves, state, T, (), checkpointed=True)
    else:
        flat, state, records = _at_once(net, leaves, state, record, T)
    outputs = [arguments.time_back(y) for y in flat]
    return pytree.tree_unflatten(outputs, net.program.output_spec), state, records


def run_step(
    net: Net, leaves: list[Tensor], given: State, state: State | None, record: tuple[str, ...]
) -> tuple[Any, State, Flat]:
    """Run one step: `(outputs, next state, nothing)`.

    Args:
        net: in step mode "s".
        leaves: the tensors of the inputs of one step.
        given, state: as for `run_sequence`.
        record: nothing.
    """
    if record:
        raise InputError("SNNFX311", "record= is for sequences", hint='Convert with step_mode="m".')
    arguments = net._arguments
    arguments.check_state(state)
    if state is not None:
        arguments.check_shapes(state, leaves)
    state = arguments.first_state(state, given)
    runners = net._graphs.runners
    part = "first" if state is None and (net.training, "first") in runners else "main"
    flat, following, _ = runners[net.training, part](net, *leaves, state, None)
    return pytree.tree_unflatten(list(flat), net.program.output_spec), following, ()


def _at_once(
    net: Net, leaves: list[Tensor], state: State | None, record: tuple[str, ...], T: int
) -> tuple[Flat, State, Flat]:
    runner = net._recordings.runner(record) if record else net._plans.runner("main", leaves, T, state)
    first = net._graphs.runners.get((net.training, "first")) if state is None else None
    if first is not None:
        if record:
            raise InputError(
                "SNNFX311",
                "record= needs the state before the first step here",
                why="the first step of this model does something else than the others.",
                hint="Run one step first: _, state = net.run(x_seq[:1]); then record the rest with state=state.",
            )
        return *_first_then_rest(net, first, runner, leaves, T), ()
    time = torch.arange(T, device=leaves[0].device) if leaves else torch.arange(T)
    return runner(net, *leaves, state, time)  # type: ignore[no-any-return]


def _first_then_rest(
    net: Net, first: Callable[..., Any], later: Callable[..., Any], leaves: list[Tensor], T: int
) -> tuple[Flat, State]:
    """The first step does something else than the others: it is run on its own."""
    outputs, state, _ = first(net, *net._arguments.at_step(leaves, 0), None, None)
    reduce = net.options.reduce
    if reduce is None:
        outputs = tuple(y.unsqueeze(0) if isinstance(y, Tensor) else y for y in outputs)
    if T == 1:
        return outputs, state
    time = torch.arange(1, T, device=leaves[0].device)
    rest, state, _ = later(net, *net._arguments.from_step(leaves, 1), state, time)
    if reduce is not None:
        return combine_reductions([(1, outputs), (T - 1, rest)], reduce), state
    return tuple(torch.cat((a, b)) if isinstance(a, Tensor) else a for a, b in zip(outputs, rest, strict=True)), state


def _in_chunks(
    net: Net,
    k: int,
    leaves: list[Tensor],
    state: State | None,
    T: int,
    record: tuple[str, ...],
    checkpointed: bool = False,
) -> tuple[Flat, State, Flat]:
    """Run k steps at a time and hand the state on; `checkpointed`: backward runs each chunk again."""
    varying = net._arguments.varying
    sequences = tuple(x for x, v in zip(leaves, varying, strict=True) if v) or (torch.arange(T),)
    reduce = net.options.reduce

    def inputs_of(chunk: Iterable[Tensor]) -> list[Tensor]:
        parts = iter(chunk)
        return [next(parts) if v else x for x, v in zip(leaves, varying, strict=True)]

    def run_again(*chunk_and_state: Any) -> tuple[Flat, State]:
        *chunk, state = chunk_and_state

        def run(inputs: list[Tensor], state: State | None) -> tuple[Flat, State]:
            flat, following, _ = _at_once(net, inputs, state, (), chunk[0].shape[0])
            return flat, following

        return net._recomputation.one_chunk(run)(inputs_of(chunk), state)  # type: ignore[no-any-return]

    if reduce is None and checkpointed:
        return *chunk_multi_step_forward(k, sequences, run_again, state=state), ()
    joined = JoinedOutputs(T) if reduce is None else JoinedReductions(reduce)
    recorded = JoinedOutputs(T) if record else None
    for chunk in zip(*(x.split(k) for x in sequences), strict=True):
        steps = chunk[0].shape[0]
        if checkpointed:
            flat, state = run_again(*chunk, state)
        else:
            flat, state, records = _at_once(net, inputs_of(chunk), state, record, steps)
            if recorded is not None:
                recorded.add(records, steps)
        joined.add(flat, steps)
    return joined.values(), state, recorded.values() if recorded is not None else ()  # type: ignore[return-value]
