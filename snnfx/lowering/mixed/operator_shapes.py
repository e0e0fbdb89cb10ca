"""Loops with products behind `snnfx::run_region`: shapes of what they leave, while a program is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.lowered_step import Needs
from snnfx.lowering.mixed.mixed_step import MixedStep

__all__ = ["Shapes", "apart", "hint", "shapes_of", "symbolic_shapes"]

Shapes = list[tuple[bool, tuple[Any, ...], torch.dtype]]
"""Of each result: whether it has a value at each step, its shape at one step, its dtype."""


def shapes_of(mixed: MixedStep, needs: Needs | None) -> Shapes:
    """Outputs, final states and what is kept, for the sizes that a step was recorded with."""
    recording, values = mixed.recording, mixed.recording.values
    plan = None if needs is None else mixed.training(needs).plan
    kept = [] if plan is None else [*plan.values, *(recording.next_states[k] for k in plan.states)]
    numbers = [(True, n) for n in recording.outputs] + [(False, n) for n in recording.next_states]
    return [(has_time, values[n].shape, values[n].dtype) for has_time, n in [*numbers, *((True, n) for n in kept)]]


def symbolic_shapes(tensors: Sequence[Tensor], shapes: Callable[[dict[str, int]], Shapes | None]) -> Shapes | None:
    """Shapes with symbols in them, from recordings with each symbol one larger than its hint.

    Args:
        tensors: steps of inputs, and states: where the symbols are.
        shapes: of recordings with some symbols changed by a number, by their names; None where there is none.
    """
    base = shapes({})
    symbols = {str(n): n for t in tensors for n in t.shape if isinstance(n, torch.SymInt)}
    if base is None:
        return None
    found: list[list[Any]] = [list(shape) for _, shape, _ in base]
    for name, symbol in symbols.items():
        larger = shapes({name: 1})
        if larger is None or [d for *_, d in larger] != [d for *_, d in base]:
            return [(t, s, d) for t, s, d in base if _fixed(symbols.values())]
        for sizes, (_, small, _), (_, large, _) in zip(found, base, larger, strict=True):
            for dim, (a, b) in enumerate(zip(small, large, strict=True)):
                if a != b:
                    sizes[dim] = sizes[dim] + (b - a) * (symbol - hint(symbol))
    return [(t, tuple(sizes), d) for sizes, (t, _, d) in zip(found, base, strict=True)]


def _fixed(symbols: Any) -> bool:
    """Have the program hold for these sizes alone."""
    return all(int(symbol) >= 0 for symbol in symbols)


def hint(size: Any) -> int:
    """The size that a traced program was met with."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 3
    return int(size)


def apart(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors that share no memory with each other or with what was given, as an operator has to return."""
    taken = {t.untyped_storage().data_ptr() for t in given}
    found = []
    for tensor in results:
        pointer = tensor.untyped_storage().data_ptr()
        own = tensor.contiguous() if pointer not in taken else tensor.clone(memory_format=torch.contiguous_format)
        taken.add(own.untyped_storage().data_ptr())
        found.append(own)
    return found
