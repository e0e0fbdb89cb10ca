"""Run calls for all time steps at once, on stacked values `[T, *]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, Recording
from snnfx.lowering.mixed.call_kinds import FunctionalCall

__all__ = ["run_batched"]


def run_batched(
    recording: Recording,
    calls: Sequence[AtenCall],
    results_read: Callable[[AtenCall], Sequence[int]],
    stacks: dict[int, Tensor],
    invariants: dict[int, Tensor],
) -> None:
    """Run calls for all time steps and add their results to `stacks`.

    Args:
        recording: the recording of the calls.
        calls: the calls, in order.
        results_read: returns the results of a call that are read later.
        stacks: values at all steps, `[T, *]`.
        invariants: values that are the same at each step.
    """
    for call in calls:
        wanted = list(results_read(call))
        if not wanted:
            continue
        results = _product(call, stacks, invariants)
        if results is None:
            results = _viewed(call, wanted, recording, stacks, invariants)
        if results is None:
            results = _joined(call, stacks)
        if results is None:
            results = _mapped(call, wanted, recording, stacks, invariants)
        stacks.update(zip(wanted, results, strict=True))


def _product(call: AtenCall, stacks: dict[int, Tensor], invariants: dict[int, Tensor]) -> list[Tensor] | None:
    """`mm` and `addmm` of a stack and a matrix: one product, T folded into the rows."""
    if call.name not in ("mm", "addmm") or call.kwargs:
        return None
    *bias, rows, matrix = [a.number for a in call.args]
    if rows not in stacks or matrix not in invariants or any(b not in invariants for b in bias):
        return None
    stack = stacks[rows]
    folded = stack.reshape(stack.shape[0] * stack.shape[1], stack.shape[2])
    if not bias:
        return [torch.mm(folded, invariants[matrix]).unflatten(0, stack.shape[:2])]
    term = invariants[bias[0]]
    if term.dim() > 1 and term.shape[0] != 1:
        return None
    return [torch.addmm(term, folded, invariants[matrix]).unflatten(0, stack.shape[:2])]


def _viewed(
    call: AtenCall,
    wanted: list[int],
    recording: Recording,
    stacks: dict[int, Tensor],
    invariants: dict[int, Tensor],
) -> list[Tensor] | None:
    """The results of a view, with the strides of the view of one step; None if the operator copies."""
    numbers = [r for r in dict.fromkeys(call.references()) if r in stacks]
    if call.traits.view != "view" or len(numbers) != 1:
        return None
    stack = stacks[numbers[0]]
    known = {r: invariants[r] for r in call.references() if r in invariants}
    views = FunctionalCall.of(call, wanted, recording).on({**known, numbers[0]: stack[0]})
    address = stack.untyped_storage().data_ptr()
    if any(v.untyped_storage().data_ptr() != address or v.is_conj() or v.is_neg() for v in views):
        return None
    count, step = stack.shape[0], stack.stride(0)
    return [stack.as_strided((count, *v.shape), (step, *v.stride()), v.storage_offset()) for v in views]


def _joined(call: AtenCall, stacks: dict[int, Tensor]) -> list[Tensor] | None:
    """`cat` of stacks, along the same dimension behind time."""
    if call.name != "cat" or call.kwargs or not all(r in stacks for r in call.references()):
        return None
    parts = [stacks[a.number] for a in call.args[0]]
    dim = call.args[1] if len(call.args) > 1 else 0
    if any(part.dim() != parts[0].dim() for part in parts):  # torch skips empty 1-d tensors
        return None
    return [torch.cat(parts, dim if dim < 0 else dim + 1)]


def _mapped(
    call: AtenCall,
    wanted: Sequence[int],
    recording: Recording,
    stacks: dict[int, Tensor],
    invariants: dict[int, Tensor],
) -> list[Tensor]:
    functional = FunctionalCall.of(call, wanted, recording)
    numbers = [r for r in dict.fromkeys(call.references()) if r in stacks]

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        known = {**invariants, **dict(zip(numbers, values, strict=True))}
        return tuple(functional.on(known))

    return list(torch.vmap(step)(*[stacks[n] for n in numbers]))
