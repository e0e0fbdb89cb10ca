"""Loop and map regions as torch's `scan` operator over one step.

The states are the carry. A loop that starts from the reset state carries their initial values, computed from the first
step of the inputs. Where these have no fixed shape or dtype, the first step differs from the later ones: a flag in the
carry selects its results, so that the scan still runs over all steps (a slice `x_seq[1:]` would need T > 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from snnfx.deploy.functional_step import functional_step
from snnfx.deploy.refusals import ExportRefused, changes_shape
from snnfx.ops.sequence_functions import expand_initial_value
from snnfx.regions.eager_regions import EagerLoop
from snnfx.sandbox.torch_internals import disable_dispatch_modes, scan_steps

__all__ = ["Loops", "as_tensor", "first_or_later", "scan_loop", "scan_map", "scan_steps_of"]

Step = Callable[..., tuple[Sequence[Any], Sequence[Any]]]
"""`(*constants, *inputs, state) -> (outputs, state)`, one time step."""


class Loops:
    """How the loops of a file run over time.

    Args:
        steps: unroll the loops to this number of time steps; None: `scan` operators, for any number.
        start: a bool tensor of shape []: ignore the given states and start from the reset state; None: use them.
    """

    def __init__(self, steps: int | None = None, start: Tensor | None = None) -> None:
        self.steps, self.start = steps, start


def scan_loop(
    region: EagerLoop,
    run: Callable[[fx.GraphModule], Callable[..., Any]],
    x_seq: Sequence[Tensor],
    state: Sequence[Any] | None,
    constants: Sequence[Any],
    loops: Loops,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run a loop region over a sequence: `(outputs [T, *], final state)`.

    Args:
        region: the region.
        run: returns the function that runs a graph of the region.
        x_seq: its inputs, `[T, *]` each.
        state: the state before the first step; None: the reset state.
        constants: the constants of the region.
        loops: how the loop runs.
    """
    like, step = x_seq[0], run(region.step)
    if not region.slot_count:
        return scan_steps_of(lambda *a: step(*a, ()), None, x_seq, constants, (), loops)
    given = None if state is None else [as_tensor(s, like) for s in state]
    if given is not None and loops.start is None:
        return scan_steps_of(step, None, x_seq, constants, given, loops)
    initial = _starting_states(region, run, constants, [x[0] for x in x_seq])
    if initial is None:
        assert region.first is not None
        return scan_steps_of(step, run(region.first), x_seq, constants, given, loops)
    if given is not None:
        assert loops.start is not None
        initial = [torch.where(loops.start, i, g) for i, g in zip(initial, given, strict=True)]
    return scan_steps_of(step, None, x_seq, constants, initial, loops)


def _starting_states(
    region: EagerLoop, run: Callable[[fx.GraphModule], Callable[..., Any]], constants: Sequence[Any], first: Any
) -> list[Tensor] | None:
    """The states before the first step, in the shape and dtype of later states; None if these are not fixed."""
    with disable_dispatch_modes():  # It reads values of tensors to emit a graph; the trace must not record this.
        start = None if region.make_start is None else region.make_start()
    if start is None or _initialises_itself(start):
        return None
    tensors = [c for c in constants if isinstance(c, Tensor)]

    def both(*flat: Tensor) -> list[Tensor]:
        own = iter(flat[len(first) :])
        values = [next(own) if isinstance(c, Tensor) else c for c in constants]
        results = run(start)(*values, *flat[: len(first)])
        return [as_tensor(s, flat[0]) for states in results for s in states]

    try:
        # Functional, because torch cannot make a graph functional that has scans, if their steps slice tensors.
        graph, more = functional_step(both, first, tensors)
        states = graph(*first, *more)
        before, after = states[: region.slot_count], states[region.slot_count :]
    except ExportRefused as error:
        if changes_shape(error):
            return None
        raise
    pairs = list(zip(before, after, strict=True))
    return before if all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs) else None


def _initialises_itself(start: fx.GraphModule) -> bool:
    """Whether a module initialises its own state in its first step, so that no value stands for it."""
    return any(node.target is expand_initial_value and node.args[0] is None for node in start.graph.nodes)


def scan_map(
    step: Callable[..., Any], x_seq: Sequence[Tensor], constants: Sequence[Any], loops: Loops
) -> tuple[Tensor, ...]:
    """Run a map region over a sequence: outputs `[T, *]`."""
    outputs, _ = scan_steps_of(lambda *a: (step(*a), ()), None, x_seq, constants, (), loops)
    return outputs


def scan_steps_of(
    step: Step,
    first: Callable[..., Any] | None,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    loops: Loops,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run a step over a sequence: `(outputs [T, *], final state)`.

    Args:
        step: `(*constants, *inputs[, state]) -> (outputs, state)`; without `state` for no slots.
        first: the first step, `(*constants, *inputs) -> (outputs, state)`, if it differs from the later ones.
        x_seq: the inputs, `[T, *]` each.
        constants: modules and tensors.
        state: the state before the first step; with `first`, it counts unless `loops.start` is true or None.
        loops: how the loop runs.
    """
    tensors = [c for c in constants if isinstance(c, Tensor)]

    def call(function: Callable[..., Any], flat: Sequence[Tensor], x: Sequence[Tensor], own: Sequence[Tensor]) -> Any:
        remaining = iter(own)
        values = [next(remaining) if isinstance(c, Tensor) else c for c in constants]
        return function(*values, *x, *([tuple(flat)] if flat else []))

    if loops.steps is not None:
        first_step = None if first is None else lambda x: call(first, (), x, tensors)
        return _unrolled(lambda s, x: call(step, s, x, tensors), first_step, x_seq, state, loops)
    like = x_seq[0]
    carry: list[Tensor] = [] if state is None else list(state)
    if first is not None:
        if state is None:
            x = [x[0] for x in x_seq]
            _, after = call(first, (), x, tensors)
            following = [as_tensor(s, like) for s in after]
            # Initial values with a batch of 1 or of integers get their later shape and dtype one after the other.
            for _ in range(1 + len(following)):
                if [(s.shape, s.dtype) for s in following] == [(s.shape, s.dtype) for s in carry]:
                    break
                carry = following
                _, after = call(step, carry, x, tensors)
                following = [as_tensor(s, like) for s in after]
            carry = [torch.zeros_like(s) for s in carry]
        flag = torch.ones((), dtype=torch.bool, device=like.device) if loops.start is None else loops.start
        carry.append(flag)
    elif not carry:
        carry = [torch.zeros((), dtype=torch.bool, device=like.device)]  # scan needs a carry
    carried, inputs = len(carry), len(x_seq)
    slots = carried - 1 if first is not None or not state else carried

    def body(*flat: Tensor) -> list[Tensor]:
        before, x, own = flat[:slots], flat[carried : carried + inputs], flat[carried + inputs :]
        outputs, after = call(step, before, x, own)
        outputs, after = [as_tensor(v, like) for v in outputs], [as_tensor(v, like) for v in after]
        if first is not None:
            outputs, after = first_or_later(flat[slots], call(first, (), x, own), (outputs, after), like)
        return [*after, *(torch.zeros_like(f) for f in flat[slots:carried]), *outputs]

    graph, more = functional_step(body, [*carry, *(x[0] for x in x_seq)], tensors)
    # `scan` refuses arguments that share memory, such as a state that starts as a view of a parameter.
    others = _without_shared_memory([*x_seq, *more])
    results = scan_steps(graph, [c.clone() for c in carry], others[:inputs], others[inputs:])
    return tuple(results[carried:]), tuple(results[:slots])


def _without_shared_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, cloned where one shares memory with an earlier one."""
    seen: set[Any] = set()
    result = []
    for x in tensors:
        memory = x.untyped_storage()._cdata
        result.append(x.clone() if memory in seen else x)
        seen.add(memory)
    return result


def first_or_later(flag: Tensor, first: Any, later: Any, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Select the results of the first step where the flag is set: `(outputs, states)`.

    Outputs have the dtype of both steps stacked; states have the dtype of later steps.
    """
    (first_outputs, first_states), (later_outputs, later_states) = first, later
    outputs = [_select(flag, a, b, like) for a, b in zip(first_outputs, later_outputs, strict=True)]
    states = [_select(flag, a, b, like, is_state=True) for a, b in zip(first_states, later_states, strict=True)]
    return outputs, states


def _select(flag: Tensor, first: Any, later: Any, like: Tensor, *, is_state: bool = False) -> Any:
    if later is None:  # the place of a carried output
        return None
    first, later = as_tensor(first, like), as_tensor(later, like)
    dtype = later.dtype if is_state else torch.promote_types(first.dtype, later.dtype)
    return torch.where(flag, first.to(dtype), later.to(dtype))


def _unrolled(
    step: Callable[..., Any],
    first_step: Callable[..., Any] | None,
    x_seq: Sequence[Tensor],
    state: Sequence[Tensor] | None,
    loops: Loops,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run the steps one after the other."""
    assert loops.steps is not None
    like, outputs = x_seq[0], []
    for t in range(loops.steps):
        x = [x[t] for x in x_seq]
        if t == 0 and first_step is not None:
            y, after = first_step(x)
            if state is not None and loops.start is not None:
                y, after = first_or_later(loops.start, (y, after), step(state, x), like)
        else:
            y, after = step(state or (), x)
        state = [as_tensor(s, like) for s in after]
        outputs.append([as_tensor(v, like) for v in y])
    return tuple(torch.stack(y) for y in zip(*outputs, strict=True)), tuple(state or ())


def as_tensor(value: Any, like: Tensor) -> Tensor:
    """A value of a step as a tensor; a number becomes one of shape [] that does not change the dtype of others."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float64 if isinstance(value, float) else None, device=like.device)
