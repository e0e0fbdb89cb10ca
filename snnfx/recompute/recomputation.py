"""Run a segment so that its backward pass recomputes it instead of saving its intermediates.

Recomputation trades time for memory (revolve: Griewank & Walther 2000; Chen et al. 2016). Here a segment is a tile
(`norm -> neurons -> pool`) with its batch statistics and, optionally, the products before them. Forward runs the
segment without autograd, slice by slice, and saves its inputs, spikes packed in bits. Backward runs the slices again
and takes vector-Jacobian products (`snnfx.recompute.segment_vjp`). So no more than one slice of the intermediates is
allocated at a time. State is a value, so a second run changes no state; random numbers, autocast, and the mode and
buffers of modules are replayed (`snnfx.recompute.replay`). Batch statistics are saved, so running statistics are
updated once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import warn_once
from snnfx.ops.batched_gradients import for_each_gradient
from snnfx.ops.first_derivatives import refuse_second_derivative
from snnfx.recompute.batch_statistics import as_non_view
from snnfx.recompute.bit_packing import PackedTensor, pack
from snnfx.recompute.replay import ModuleSettings, parameters_of
from snnfx.recompute.segment import Segment, SegmentCall, TileCall
from snnfx.recompute.segment_vjp import backward
from snnfx.sandbox.torch_internals import are_transforms_active, pytree
from snnfx.state.hooks import has_forward_hooks

__all__ = ["run_segment"]


def run_segment(segment: Segment, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Run a segment with recomputation in backward: `(sequences, final states)`.

    Autograd saves the intermediates as usual where recomputation is impossible: under torch.compile (whose partitioner
    decides what to recompute), under transforms of torch.func, for an empty batch, and if a module of the segment has
    forward hooks, which would run twice.
    """
    if torch.compiler.is_compiling() or are_transforms_active() or not torch.is_grad_enabled():
        return segment.run_with_autograd(values)  # type: ignore[no-any-return]
    leaves, spec = pytree.tree_flatten(values)
    modules = [m for leaf in leaves if isinstance(leaf, nn.Module) for m in leaf.modules()]
    parameters = parameters_of(modules)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    is_empty = any(t.numel() == 0 for t in tensors)
    if is_empty or not any(t.requires_grad for t in (*tensors, *parameters)):
        return segment.run_with_autograd(values)  # type: ignore[no-any-return]
    if any(map(has_forward_hooks, modules)):
        warn_once(
            "SNNFX504",
            f"cannot recompute {segment.label} in the backward pass: a module in it has forward hooks, which would run "
            "twice. Autograd saves its intermediate tensors instead.",
        )
        return segment.run_with_autograd(values)  # type: ignore[no-any-return]
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    non_tensors = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    needs_gradient = [_needs_gradient(product, values) for product in segment.products]
    settings = ModuleSettings(modules, parameters)
    call = SegmentCall(segment, non_tensors, spec, positions, settings, needs_gradient)
    results = iter(_RecomputedSegment.apply(call, *tensors, *parameters))
    return pytree.tree_unflatten(  # type: ignore[no-any-return]
        [next(results) if is_tensor else value for is_tensor, value in call.result_leaves], call.result_spec
    )


def _needs_gradient(product: TileCall, values: Sequence[Any]) -> bool:
    """Whether an input or a parameter of a product requires a gradient."""
    leaves = pytree.tree_leaves([values[n] for n in (*product.sequences, *product.constants)])
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    tensors += [p for x in leaves if isinstance(x, nn.Module) for p in x.parameters()]
    return any(x.requires_grad for x in tensors)


class _RecomputedSegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SegmentCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        count = len(call.tensor_positions)
        inputs, parameters = tensors[:count], tensors[count:]
        largest_integers = call.largest_integers(inputs)
        outputs, statistics = call.forward(inputs)
        leaves, call.result_spec = pytree.tree_flatten(outputs)
        call.result_leaves = [(isinstance(y, Tensor), None if isinstance(y, Tensor) else y) for y in leaves]
        saved: list[Tensor] = []
        ctx.packed = []
        for x, largest in zip(inputs, largest_integers, strict=True):
            packed = pack(x, largest) if largest else None
            ctx.packed.append(packed and (packed.shape, packed.order, packed.dtype, packed.largest))
            saved.append(x if packed is None else packed.data)
        # Statistics are saved through autograd as well, so that they are freed together with the other tensors.
        ctx.save_for_backward(*saved, *parameters, *statistics)
        ctx.counts = (count, count + len(parameters))
        results = [y for y in leaves if isinstance(y, Tensor)]
        storages = Counter(x.untyped_storage()._cdata for x in (*inputs, *results))
        returned = tuple(as_non_view(y) if storages[y.untyped_storage()._cdata] == 1 else y for y in results)
        ctx.mark_non_differentiable(*(y for y in returned if not (y.is_floating_point() or y.is_complex())))
        return returned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative(
            "a recomputed segment", "Convert with checkpoint=None, lower=None: PyTorch then builds the autograd graph."
        )
        call: SegmentCall = ctx.call
        saved, (first, second) = ctx.saved_tensors, ctx.counts
        inputs: list[Any] = [
            x if packed is None else PackedTensor(x, *packed)
            for x, packed in zip(saved[:first], ctx.packed, strict=True)
        ]
        needs = ctx.needs_input_grad[1:]

        def recompute(of_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
            remaining = iter(of_outputs)
            of_results = [next(remaining) if is_tensor else None for is_tensor, _ in call.result_leaves]
            of_tensors, of_parameters = backward(call, inputs, saved[first:second], saved[second:], needs, of_results)
            return [*of_tensors, *of_parameters]

        return None, *for_each_gradient(recompute, grads)
