"""Kernels of `snnfx::run_region`, the operator of a loop under torch.compile and torch.export.

Tracing a program uses fake tensors with symbolic sizes. The step is then recorded on real tensors of the same dtypes
and example sizes; recordings hold for all T, and mostly for all batch sizes, so the operator finds the same recording
at run time. In a compiled program all results are contiguous, whatever the layout of the input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import PassError
from snnfx.lowering.elementwise.lowered_step import LoweredStep, Needs, SavedContext
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.lowering.mixed.operator_shapes import ResultShapes, result_shapes, size_hint, symbolic_shapes, unaliased
from snnfx.regions.region_kernels import PreparedCall, RegionKernels
from snnfx.regions.sequence_region import tensors_of
from snnfx.sandbox.plain_dispatch import ordinary_dispatch
from snnfx.sandbox.torch_internals import disable_dispatch_modes, unset_fake_temporarily

__all__ = ["fake_results", "run_backward", "run_forward"]


def run_forward(
    kernels: RegionKernels,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    needs: Sequence[bool],
) -> list[Tensor] | None:
    """Outputs, final states and tensors saved for backward; None if the loop has to be stepped."""
    prepared = kernels.prepare(x_seq, state, constants)
    if prepared is None or not _starts_from_known_states(prepared, state):
        return None
    needed = _needs(prepared, x_seq, constants, state, needs)
    if not kernels.build_for(prepared, needed):
        raise PassError(
            "SNNFX503",
            f"the kernel of {kernels.label} can no longer be built",
            why=kernels.refusal,
            hint="Compile or export the net again.",
        )
    states, constants_read = prepared.first_states(state), prepared.constants_read
    if isinstance(prepared.lowered, MixedStep):
        outputs, finals, saved = prepared.lowered.forward(x_seq, states, constants_read, needed)
        return unaliased([*outputs, *finals, *saved], [*x_seq, *constants_read, *(state or ())])
    outputs, finals, saved, _ = prepared.lowered.forward(x_seq, states, constants_read, needed, keep_layout=False)
    return [*outputs, *finals, *saved]


def fake_results(
    kernels: RegionKernels,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    needs: Sequence[bool],
) -> list[Tensor] | None:
    """The results of `run_forward` as fake tensors."""
    if x_seq[0].device.type == "cuda" and not torch.cuda.is_available():
        return None  # no device to record a step on
    with _real_tensors():
        recorded = _recorded(kernels, x_seq, constants, state, needs, {})
    if recorded is None:
        return None
    prepared, needed = recorded
    lowered = prepared.lowered
    if isinstance(lowered, MixedStep):
        return _fake_results_of_mixed(kernels, x_seq, constants, state, needs)
    saved = [] if needed is None else lowered.saved_dtypes(needed)
    T = x_seq[0].shape[0]
    shape = _step_shape(lowered, x_seq, state, prepared.operand_shapes)
    return [
        *(x_seq[0].new_empty((T, *shape), dtype=d) for d in lowered.output_dtypes),
        *(x_seq[0].new_empty(shape, dtype=d) for d in lowered.state_dtypes),
        *(x_seq[0].new_empty((T, *shape), dtype=d) for d in saved),
    ]


def _recorded(
    kernels: RegionKernels,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    needs: Sequence[bool],
    larger: dict[str, int],
) -> tuple[PreparedCall, Needs | None] | None:
    """Record a step on real tensors in the shapes of fake ones, some symbolic sizes enlarged.

    Args:
        kernels, x_seq, constants, state, needs: as for `fake_results`.
        larger: name of a symbolic size -> by how much it is enlarged.
    """
    x_real = [_example_tensor(x, larger, first=1) for x in x_seq]
    state_real = None if state is None else [_example_tensor(s, larger) for s in state]
    tensors = iter([c for c in constants if isinstance(c, Tensor)])
    flags = iter(needs[len(x_seq) :])
    real: list[Any] = []
    for constant in constants:
        if isinstance(constant, nn.Module):
            real.append(constant)
            for _ in (*constant.parameters(), *constant.buffers()):
                next(flags)
        else:
            real.append(_example_tensor(next(tensors), {}).requires_grad_(next(flags)))
    prepared = kernels.prepare(x_real, state_real, real)
    if prepared is None or not _starts_from_known_states(prepared, state):
        return None
    needed = _needs(prepared, x_real, real, state_real, needs)
    return (prepared, needed) if kernels.build_for(prepared, needed) else None


def _fake_results_of_mixed(
    kernels: RegionKernels,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    needs: Sequence[bool],
) -> list[Tensor] | None:
    def shapes(larger: dict[str, int]) -> ResultShapes | None:
        with _real_tensors():
            recorded = _recorded(kernels, x_seq, constants, state, needs, larger)
            if recorded is None or not isinstance(recorded[0].lowered, MixedStep):
                return None
            return result_shapes(recorded[0].lowered, recorded[1])

    results = symbolic_shapes([*(x[0] for x in x_seq), *(state or ())], shapes)
    if results is None:
        return None
    T = x_seq[0].shape[0]
    return [x_seq[0].new_empty((T, *shape) if has_time else shape, dtype=d) for has_time, shape, d in results]


def run_backward(
    kernels: RegionKernels,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor] | None:
    """Gradients of the inputs, constants and states that need one; None if the loop was stepped."""
    prepared = kernels.prepare(x_seq, state, constants)
    if prepared is None or not _starts_from_known_states(prepared, state):
        return None
    needed = _needs(prepared, x_seq, constants, state, needs)
    assert needed is not None
    lowered = prepared.lowered
    states = prepared.first_states(state)
    count = len(lowered.output_dtypes)
    if isinstance(lowered, MixedStep):
        grad_x, grad_states, grad_constants = lowered.backward(
            needed, x_seq[0].shape[0], x_seq, prepared.constants_read, saved, grads[:count], grads[count:]
        )
        shapes = [s.shape if isinstance(s, Tensor) else () for s in states]
        grad_states = [
            None if g is None else g.sum_to_size(shape) for g, shape in zip(grad_states, shapes, strict=True)
        ]
        gradients = _gradients_in_order(prepared, x_seq, constants, state, needs, (grad_x, grad_states, grad_constants))
        return unaliased(gradients, [*x_seq, *prepared.constants_read, *(state or ()), *saved, *grads])
    shape = lowered.shape_of_step(x_seq, states)
    numbers = tuple(None if isinstance(s, Tensor) else float(s) for s in states)
    details = SavedContext(needed, x_seq[0].shape[0], shape, tuple(range(len(shape))), numbers)
    tensors = [s if isinstance(s, Tensor) else None for s in states]
    grad_x, grad_states, grad_constants = lowered.backward(
        details,
        x_seq,
        tensors,
        prepared.constants_read,
        saved,
        grads[:count],
        grads[count:],
        ([x.shape for x in x_seq], [s.shape if isinstance(s, Tensor) else () for s in states]),
    )
    return _gradients_in_order(prepared, x_seq, constants, state, needs, (grad_x, grad_states, grad_constants))


def _gradients_in_order(
    prepared: PreparedCall,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    needs: Sequence[bool],
    grads: tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]],
) -> list[Tensor]:
    """The gradients that are needed, of inputs, tensors of the constants and states in this order."""
    grad_x, grad_states, grad_constants = grads
    by_tensor = {id(t): g for t, g in zip(prepared.constants_read, grad_constants, strict=True)}
    everything = [*x_seq, *tensors_of(constants), *(state or ())]
    gradients: list[Tensor | None] = [*grad_x, *(by_tensor.get(id(t)) for t in tensors_of(constants))]
    gradients += grad_states if state is not None else []
    return [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None else g.contiguous()
        for t, g, need in zip(everything, gradients, needs, strict=True)
        if need
    ]


def _starts_from_known_states(prepared: PreparedCall, state: Sequence[Tensor] | None) -> bool:
    """Whether the states before the first step are numbers or given by the caller."""
    return prepared.starts_from_numbers and not prepared.runs_first_step(state)


def _needs(
    prepared: PreparedCall,
    x_seq: Sequence[Tensor],
    constants: Sequence[Any],
    state: Sequence[Tensor] | None,
    needs: Sequence[bool],
) -> Needs | None:
    if not any(needs):
        return None
    count = len(x_seq)
    tensors = tensors_of(constants)
    by_tensor = {id(t): n for t, n in zip(tensors, needs[count : count + len(tensors)], strict=True)}
    states = needs[count + len(tensors) :] if state is not None else [False] * len(prepared.lowered.state_dtypes)
    constants_read = tuple(by_tensor.get(id(t), False) for t in prepared.constants_read)
    return Needs(tuple(needs[:count]), tuple(states), constants_read)


@contextlib.contextmanager
def _real_tensors() -> Iterator[None]:
    """Compute with real tensors while a program is traced."""
    with disable_dispatch_modes(), unset_fake_temporarily(), ordinary_dispatch(grad=False):
        yield


def _example_tensor(tensor: Tensor, larger: dict[str, int], first: int | None = None) -> Tensor:
    shape = [size_hint(n) + (larger.get(str(n), 0) if isinstance(n, torch.SymInt) else 0) for n in tensor.shape]
    if first is not None:
        shape[0] = first
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def _step_shape(
    lowered: LoweredStep,
    x_seq: Sequence[Tensor],
    state: Sequence[Tensor] | None,
    operand_shapes: Sequence[tuple[int, ...]],
) -> tuple[Any, ...]:
    """The shape of a step, with symbolic sizes."""
    for x in x_seq:
        if x.dim() - 1 == len(lowered.step.shape) and not any(
            isinstance(a, int) and isinstance(b, int) and a == 1 != b
            for a, b in zip(x.shape[1:], lowered.step.shape, strict=True)
        ):
            return tuple(x.shape[1:])
    shapes = [x.shape[1:] for x in x_seq if x.is_floating_point()]
    shapes += [s.shape for s in state or ()]
    return tuple(torch.broadcast_shapes(*shapes, *operand_shapes))
