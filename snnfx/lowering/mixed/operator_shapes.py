"""Result shapes of a mixed loop for `snnfx::run_region`, while a program is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.lowered_step import Needs
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.ops.shared_memory import addresses_of

__all__ = ["ResultShapes", "result_shapes", "size_hint", "symbolic_shapes", "unaliased"]

ResultShapes = list[tuple[bool, tuple[Any, ...], torch.dtype]]
"""For each result: whether it has a time dimension, its shape at one step, its dtype."""


def result_shapes(mixed: MixedStep, needs: Needs | None) -> ResultShapes:
    """Shapes of the outputs, final states and saved tensors, for the sizes of the recorded step."""
    recording, values = mixed.recording, mixed.recording.values
    plan = None if needs is None else mixed.training(needs).plan
    saved = [] if plan is None else [*plan.values, *(recording.next_states[k] for k in plan.states)]
    numbers = [(True, n) for n in recording.outputs] + [(False, n) for n in recording.next_states]
    return [(has_time, values[n].shape, values[n].dtype) for has_time, n in [*numbers, *((True, n) for n in saved)]]


def symbolic_shapes(
    tensors: Sequence[Tensor], shapes: Callable[[dict[str, int]], ResultShapes | None]
) -> ResultShapes | None:
    """Symbolic result shapes, from recordings with each symbolic size enlarged by one.

    Args:
        tensors: steps of inputs, and states, whose shapes contain the symbolic sizes.
        shapes: returns the shapes if some sizes, by name, are enlarged by a number; None if the step is not lowered.
    """
    base = shapes({})
    symbols = {str(n): n for t in tensors for n in t.shape if isinstance(n, torch.SymInt)}
    if base is None:
        return None
    symbolic: list[list[Any]] = [list(shape) for _, shape, _ in base]
    for name, symbol in symbols.items():
        larger = shapes({name: 1})
        if larger is None or [d for *_, d in larger] != [d for *_, d in base]:
            return [(t, s, d) for t, s, d in base if _fixed(symbols.values())]
        for sizes, (_, small, _), (_, large, _) in zip(symbolic, base, larger, strict=True):
            for dim, (a, b) in enumerate(zip(small, large, strict=True)):
                if a != b:
                    sizes[dim] = sizes[dim] + (b - a) * (symbol - size_hint(symbol))
    return [(t, tuple(sizes), d) for sizes, (t, _, d) in zip(symbolic, base, strict=True)]


def _fixed(symbols: Any) -> bool:
    """Specialise the traced program to these sizes."""
    return all(int(symbol) >= 0 for symbol in symbols)


def size_hint(size: Any) -> int:
    """The example value of a possibly symbolic size."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 3
    return int(size)


def unaliased(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous results that share no memory with each other or with the inputs, as custom operators require."""
    taken = addresses_of(given)
    copies = []
    for tensor in results:
        pointer = tensor.untyped_storage().data_ptr()
        own = tensor.contiguous() if pointer not in taken else tensor.clone(memory_format=torch.contiguous_format)
        taken.add(own.untyped_storage().data_ptr())
        copies.append(own)
    return copies
