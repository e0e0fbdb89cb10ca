"""Batched gradients: run a backward function once for each element of a batch of gradients.

`torch.autograd.grad(..., is_grads_batched=True)`, `jacobian(vectorize=True)` and `gradcheck(check_batched_grad=True)`
run the backward pass under the vmap inside torch.autograd, `torch.func` under its own. A kernel reads the memory of its
operands, and recomputation writes slices into buffers; neither sees batched tensors. So they run element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.sandbox.plain_dispatch import ordinary_dispatch
from snnfx.sandbox.torch_internals import (
    add_autograd_batch,
    are_transforms_active,
    dispatch_mode_count,
    is_batched_by_autograd,
    level_of_autograd_batch,
    remove_autograd_batch,
)

__all__ = ["for_each_gradient", "is_plain_gradient"]

Gradients = Sequence[Tensor | None]


def is_plain_gradient(tensor: Tensor) -> bool:
    """Whether a kernel may read a gradient or saved tensor: not batched, differentiated again, or lazily negated."""
    return not (
        torch.is_grad_enabled()
        or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer)
        or is_batched_by_autograd(tensor)
        or tensor.is_neg()
        or are_transforms_active()
        or dispatch_mode_count()
    )


def for_each_gradient(backward: Callable[[Gradients], Gradients], grads: Gradients) -> Gradients:
    """Return `backward(grads)`; if gradients are batched, run it for each element and stack the results.

    Args:
        backward: returns the gradients of the inputs of a function from the gradients of its outputs. Which of them are
            None must not depend on values.
        grads: the gradients of the outputs, batched or not.
    """
    if are_transforms_active():
        is_given: list[bool] = []

        def without_none(*of_outputs: Tensor | None) -> tuple[Tensor, ...]:
            of_inputs = backward(of_outputs)
            is_given[:] = [g is not None for g in of_inputs]
            return tuple(g for g in of_inputs if g is not None)

        results = iter(_ForEachGradient.apply(without_none, *grads))
        return [next(results) if given else None for given in is_given]
    for g in grads:
        if g is not None and is_batched_by_autograd(g):
            return _of_autograd_batch(backward, grads, level_of_autograd_batch(g))
    return backward(grads)


def _of_autograd_batch(
    backward: Callable[[Gradients], Gradients], grads: Gradients, level_and_size: tuple[int, int]
) -> Gradients:
    level, size = level_and_size
    batches = [None if g is None else remove_autograd_batch(g, level, size) for g in grads]
    with ordinary_dispatch(grad=False):
        each = [for_each_gradient(backward, [None if b is None else b[i] for b in batches]) for i in range(size)]
        stacked = [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
    return [None if s is None else add_autograd_batch(s, level) for s in stacked]


class _ForEachGradient(torch.autograd.Function):
    """A backward function under the transforms of torch.func."""

    @staticmethod
    def forward(backward: Callable[..., tuple[Tensor, ...]], *grads: Tensor | None) -> tuple[Tensor, ...]:
        return backward(*grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], backward: Callable[..., tuple[Tensor, ...]], *grads: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        dims = in_dims[1:]
        each = [
            _ForEachGradient.apply(
                backward, *(g if g is None or d is None else g.select(d, i) for g, d in zip(grads, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(column) for column in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)
