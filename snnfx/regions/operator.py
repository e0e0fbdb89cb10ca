"""`snnfx::run_region`: a loop or map region as one custom operator.

A compiled net thus does not depend on T. The forward pass steps the region's graph (or maps it); of a loop it saves
only the states after each step. The backward pass visits the steps in reverse, recomputes each under autograd and takes
its vector-Jacobian product, surrogate gradients included: back-propagation through time with one step alive at a time.
If the region has kernels, they run both passes. The tensors of the region's modules are arguments, so autograd and
torch.compile see them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.mixed.operator_shapes import unaliased
from snnfx.regions.eager_regions import EagerLoop, EagerMap
from snnfx.regions.kernel_operator import fake_results, run_backward, run_forward
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.sequence_region import SequenceRegion, region_of_handle, tensors_of
from snnfx.sandbox.plain_dispatch import ordinary_dispatch
from snnfx.sandbox.structural_copy import StructuralCopy

__all__ = ["real_tensors_allowed", "run_loop_as_operator", "run_map_as_operator"]


def run_loop_as_operator(
    region: EagerLoop, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run `LoopRegion.multi_step` as the operator."""
    tensors = tensors_of(constants)
    first = [] if state is None else [s if isinstance(s, Tensor) else torch.tensor(s) for s in state]
    needs = [t.requires_grad and torch.is_grad_enabled() for t in (*x_seq, *tensors, *first)]
    results = torch.ops.snnfx.run_region(region.handle, list(x_seq), tensors, first, state is not None, needs)
    outputs = region.output_count
    # After the outputs: the final states, then the tensors saved for backward.
    return tuple(results[:outputs]), tuple(results[outputs : outputs + region.slot_count])


def run_map_as_operator(region: EagerMap, x_seq: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Tensor, ...]:
    """Run `MapRegion.map_steps` as the operator."""
    tensors = tensors_of(constants)
    needs = [t.requires_grad and torch.is_grad_enabled() for t in (*x_seq, *tensors)]
    return tuple(torch.ops.snnfx.run_region(region.handle, list(x_seq), tensors, [], False, needs))


def _constants_using(region: SequenceRegion, tensors: Sequence[Tensor]) -> list[Any]:
    """The constants of a region, its modules replaced by copies that have `tensors` as parameters and buffers."""
    remaining = iter(tensors)
    constants: list[Any] = []
    for target in region.constant_targets:
        if target is None:
            constants.append(next(remaining))
            continue
        assert region.resolve is not None
        module = region.resolve(target)
        replacements = {id(own): next(remaining) for own in (*module.parameters(), *module.buffers())}
        # Copies, because other threads use the modules meanwhile.
        copies = StructuralCopy(tensor=lambda own, by_id=replacements: by_id.get(id(own), own), objects=False)  # type: ignore[misc]
        constants.append(copies.of(module))
    return constants


def _constants_of(region: SequenceRegion, tensors: Sequence[Tensor]) -> list[Any]:
    """The constants of a region: its modules unchanged, and those of `tensors` that belong to no module."""
    remaining = iter(tensors)
    constants: list[Any] = []
    for target in region.constant_targets:
        if target is None:
            constants.append(next(remaining))
            continue
        assert region.resolve is not None
        constants.append(region.resolve(target))
        for _ in (*constants[-1].parameters(), *constants[-1].buffers()):
            next(remaining)
    return constants


def _kernels_of(region: SequenceRegion) -> RegionKernels | None:
    return region.kernels if isinstance(region, EagerLoop) else None


def _run_kernel(
    region: SequenceRegion,
    run: Any,
    x_seq: Sequence[Tensor],
    tensors: Sequence[Tensor],
    state: Sequence[Tensor],
    has_state: bool,
    needs: Sequence[bool],
    *more: Any,
) -> list[Tensor] | None:
    """Run the kernels of a region; None if it has none."""
    kernels = _kernels_of(region)
    if kernels is None:
        return None
    count = len(x_seq)
    flags = needs[count : count + len(tensors)]
    leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, flags, strict=True)]
    constants = _constants_using(region, leaves)
    with ordinary_dispatch(grad=False):
        first = list(state) if has_state else None
        return run(kernels, list(x_seq), constants, first, *more, list(needs))  # type: ignore[no-any-return]


@contextlib.contextmanager
def real_tensors_allowed(x: Tensor) -> Iterator[None]:
    """Allow real tensors under fake mode: a model may have tensors that are neither parameters nor buffers."""
    mode = getattr(x, "fake_mode", None)
    if mode is None:
        yield
        return
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


@torch.library.custom_op("snnfx::run_region", mutates_args=())
def run_region(
    handle: str,
    x_seq: Sequence[Tensor],
    tensors: Sequence[Tensor],
    state: Sequence[Tensor],
    has_state: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Run a region over a sequence.

    Args:
        handle: the handle of the region.
        x_seq: the inputs, `[T, *]` each.
        tensors: the tensors among the constants, see `tensors_of`.
        state: the states before the first step, if `has_state`.
        has_state: False: start from the reset state.
        needs: for each of `x_seq`, `tensors` and `state`, whether it needs a gradient.

    Returns:
        The outputs; for a loop then the final states and the tensors saved for backward: those that its kernel saves,
        or the states after each step.
    """
    region = region_of_handle(handle)
    results = _run_kernel(region, run_forward, x_seq, tensors, state, has_state, needs)
    if results is not None:
        return results
    with ordinary_dispatch(grad=False):
        constants = _constants_using(region, tensors)
        if isinstance(region, EagerMap):
            return unaliased(region.map_eagerly(x_seq, constants), [*x_seq, *tensors])
        current: Any = tuple(state) if has_state else None
        outputs: list[Sequence[Tensor]] = []
        states: list[Sequence[Tensor]] = []
        for x in zip(*(x.unbind(0) for x in x_seq), strict=True):
            y, current = region(*constants, *x, current)
            outputs.append([torch.as_tensor(v) for v in y])
            states.append([torch.as_tensor(s) for s in current])
        stacked = [torch.stack(y) for y in zip(*outputs, strict=True)]
        final = [s.clone(memory_format=torch.contiguous_format) for s in states[-1]]
        return [*stacked, *final, *(torch.stack(s) for s in zip(*states, strict=True))]


@run_region.register_fake
def _(
    handle: str,
    x_seq: Sequence[Tensor],
    tensors: Sequence[Tensor],
    state: Sequence[Tensor],
    has_state: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    region = region_of_handle(handle)
    kernels = _kernels_of(region)
    if kernels is not None:
        unchanged, first = _constants_of(region, tensors), list(state) if has_state else None
        results = fake_results(kernels, x_seq, unchanged, first, needs)
        if results is not None:
            return results
    T = x_seq[0].shape[0]
    constants = _constants_using(region, tensors)
    with real_tensors_allowed(x_seq[0]):
        x = [x[0] for x in x_seq]
        if isinstance(region, EagerMap):
            return [y.new_empty((T, *y.shape)) for y in region(*constants, *x)]
        # The first step may start from numbers; from the second step on every state has its full shape.
        _, after = region(*constants, *x, tuple(state) if has_state else None)
        outputs, after = region(*constants, *x, after)
        after = [torch.as_tensor(s) for s in after]
        return [
            *(y.new_empty((T, *y.shape)) for y in map(torch.as_tensor, outputs)),
            *(s.new_empty(s.shape) for s in after),
            *(s.new_empty((T, *s.shape)) for s in after),
        ]


@torch.library.custom_op("snnfx::run_region_backward", mutates_args=())
def run_region_backward(
    handle: str,
    x_seq: Sequence[Tensor],
    tensors: Sequence[Tensor],
    state: Sequence[Tensor],
    has_state: bool,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of `x_seq`, `tensors` and `state`, in this order, for those that need one.

    Args:
        handle, x_seq, tensors, state, has_state, needs: as in `run_region`.
        kept: the tensors saved for backward.
        grads: the gradients of the outputs and the final states.
    """
    region = region_of_handle(handle)
    results = _run_kernel(region, run_backward, x_seq, tensors, state, has_state, needs, kept, grads)
    if results is not None:
        return results
    with ordinary_dispatch(grad=True):
        leaves = [t.detach().requires_grad_(n) for t, n in zip([*x_seq, *tensors, *state], needs, strict=True)]
        xs = leaves[: len(x_seq)]
        leaf_tensors = leaves[len(x_seq) : len(x_seq) + len(tensors)]
        first = leaves[len(x_seq) + len(tensors) :]
        constants = _constants_using(region, leaf_tensors)
        if isinstance(region, EagerMap):
            needed = [leaf for leaf, n in zip(leaves, needs, strict=True) if n]
            gradients = _vjp(region.map_eagerly(xs, constants), grads, needed)
            results = [torch.zeros_like(w) if g is None else g for w, g in zip(needed, gradients, strict=True)]
        else:
            results = _backward_through_time(
                region, constants, xs, leaf_tensors, first if has_state else None, kept, grads, needs
            )
        return unaliased(results, [*x_seq, *tensors, *state, *kept, *grads])


def _backward_through_time(
    region: SequenceRegion,
    constants: Sequence[Any],
    x_seq: Sequence[Tensor],
    tensors: Sequence[Tensor],
    state: Sequence[Tensor] | None,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Back-propagation through time that recomputes one step at a time."""
    T = x_seq[0].shape[0]
    count = region.output_count
    grad_y, grad_state = list(grads[:count]), list(grads[count:])
    x_needed, tensor_needed = needs[: len(x_seq)], needs[len(x_seq) : len(x_seq) + len(tensors)]
    grad_x = [torch.zeros_like(x) if n else None for x, n in zip(x_seq, x_needed, strict=True)]
    grad_tensors = [torch.zeros_like(p) if n else None for p, n in zip(tensors, tensor_needed, strict=True)]
    needed_tensors = [p for p, n in zip(tensors, tensor_needed, strict=True) if n]
    for t in range(T - 1, -1, -1):
        x = [x[t].detach().requires_grad_(n) for x, n in zip(x_seq, x_needed, strict=True)]
        if t > 0:
            before: list[Tensor] | None = [s[t - 1].detach() for s in kept]
        else:
            before = None if state is None else [s.detach() for s in state]
        for s in before or ():
            s.requires_grad_(s.is_floating_point() or s.is_complex())
        y, after = region(*constants, *x, None if before is None else tuple(before))
        inputs = [v for v, n in zip(x, x_needed, strict=True) if n]
        inputs += [s for s in before or () if s.requires_grad]
        gradients = _vjp([*y, *after], [*(g[t] for g in grad_y), *grad_state], [*inputs, *needed_tensors])
        remaining = iter(gradients)
        for total in grad_x:
            if total is not None and (g := next(remaining)) is not None:
                total[t] = g
        grad_state = [_zeros_for(next(remaining) if s.requires_grad else None, s) for s in before or ()]
        for i, total in enumerate(grad_tensors):
            if total is not None and (g := next(remaining)) is not None:
                grad_tensors[i] = total + g
    grad_first = grad_state if state is not None else []
    everything = [*grad_x, *grad_tensors, *grad_first]
    return [g for g, n in zip(everything, needs, strict=True) if n and g is not None]


def _zeros_for(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _vjp(outputs: Sequence[Any], grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if isinstance(y, Tensor) and y.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return torch.autograd.grad([y for y, _ in pairs], list(inputs), [g for _, g in pairs], allow_unused=True)


@run_region_backward.register_fake
def _(
    handle: str,
    x_seq: Sequence[Tensor],
    tensors: Sequence[Tensor],
    state: Sequence[Tensor],
    has_state: bool,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    everything = [*x_seq, *tensors, *state]
    needed = [t for t, n in zip(everything, needs, strict=True) if n]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    handle, x_seq, tensors, state, has_state, _ = inputs
    region = region_of_handle(handle)
    kept = output[region.output_count + region.slot_count :]
    ctx.handle, ctx.has_state = handle, has_state
    ctx.sizes = (len(x_seq), len(tensors), len(state))
    ctx.results = [(y.shape, y.dtype, y.device) for y in output[: len(output) - len(kept)]]
    ctx.needs = [t.requires_grad for t in (*x_seq, *tensors, *state)]
    ctx.save_for_backward(*x_seq, *tensors, *state, *kept)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n_x, n_tensors, n_state = ctx.sizes
    saved = list(ctx.saved_tensors)
    x_seq, tensors = saved[:n_x], saved[n_x : n_x + n_tensors]
    state = saved[n_x + n_tensors : n_x + n_tensors + n_state]
    kept = saved[n_x + n_tensors + n_state :]
    output_grads = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for (shape, dtype, device), g in zip(ctx.results, grads, strict=False)
    ]
    backward = torch.ops.snnfx.run_region_backward
    gradients = iter(backward(ctx.handle, x_seq, tensors, state, ctx.has_state, kept, output_grads, ctx.needs))
    in_order = [next(gradients) if need else None for need in ctx.needs]
    return None, in_order[:n_x], in_order[n_x : n_x + n_tensors], in_order[n_x + n_tensors :], None, None


run_region.register_autograd(_backward, setup_context=_setup_context)
