"""Computing again in the backward pass what the forward pass did not keep.

Revolve and its kin trade recomputation for memory (Griewank & Walther 2000; Chen et al. 2016). Here a segment is a
tile (`norm -> neurons -> pool`) with the statistics that it normalises by and, if that is wanted, the products in
front of it. Forward runs it without a history, slice by slice, and keeps what enters it, spikes packed in bits;
backward runs the slices again and takes vector-Jacobian products (`snnfx.recompute.segment_vjp`). So of its insides no
more than a slice is alive. State is a value, so nothing has to be put back afterwards; what a second run could change
or see differently is replayed: random numbers, autocast, the mode of modules, and buffers, which it gets as copies.
Statistics are kept, so they move once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import warn_once
from snnfx.ops.first_derivatives import refuse_second_derivative
from snnfx.recompute.batch_statistics import as_its_own
from snnfx.recompute.bit_packing import PackedTensor, pack
from snnfx.recompute.replay import Modules, parameters_of, recompute_lock
from snnfx.recompute.segment import Segment, SegmentCall, TileCall
from snnfx.recompute.segment_vjp import backward
from snnfx.sandbox.torch_internals import are_transforms_active, pytree
from snnfx.state.registry import has_forward_hooks

__all__ = ["run_segment"]


def run_segment(segment: Segment, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Run a segment so that its backward pass computes it again: `(sequences, final states)`.

    It keeps its history as usual where that cannot be done: under torch.compile (whose own partitioner decides what to
    compute again), under transforms of torch.func, without samples, and while a module in it has forward hooks, which
    would fire twice.
    """
    if torch.compiler.is_compiling() or are_transforms_active() or not torch.is_grad_enabled():
        return segment.plainly(values)  # type: ignore[no-any-return]
    leaves, spec = pytree.tree_flatten(values)
    modules = [m for leaf in leaves if isinstance(leaf, nn.Module) for m in leaf.modules()]
    parameters = parameters_of(modules)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    is_empty = any(t.numel() == 0 for t in tensors)
    if is_empty or not any(t.requires_grad for t in (*tensors, *parameters)):
        return segment.plainly(values)  # type: ignore[no-any-return]
    if any(map(has_forward_hooks, modules)):
        what = f"{segment.label} is not computed again in backward, and its history is kept"
        warn_once("SNNFX504", f"{what}: a module in it has forward hooks, which would fire twice.")
        return segment.plainly(values)  # type: ignore[no-any-return]
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    statics = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    flows = [_flows(product, values) for product in segment.products]
    with recompute_lock:
        call = SegmentCall(segment, statics, spec, positions, Modules(modules, parameters), flows)
        found = iter(_Recompute.apply(call, *tensors, *parameters))
    return pytree.tree_unflatten(  # type: ignore[no-any-return]
        [next(found) if is_tensor else value for is_tensor, value in call.results], call.result_spec
    )


def _flows(call: TileCall, values: Sequence[Any]) -> bool:
    """Whether a gradient goes back through a product: to something that goes in, or to a parameter."""
    leaves = pytree.tree_leaves([values[n] for n in (*call.sequences, *call.constants)])
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    tensors += [p for x in leaves if isinstance(x, nn.Module) for p in x.parameters()]
    return any(x.requires_grad for x in tensors)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: SegmentCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        count = len(call.tensor_positions)
        inputs, parameters = tensors[:count], tensors[count:]
        packable = call.packable(inputs)
        outputs, statistics = call.forward(inputs)
        leaves, call.result_spec = pytree.tree_flatten(outputs)
        call.results = [(isinstance(y, Tensor), None if isinstance(y, Tensor) else y) for y in leaves]
        kept: list[Tensor] = []
        ctx.packed = []
        for x, largest in zip(inputs, packable, strict=True):
            packed = pack(x, largest) if largest else None
            ctx.packed.append(packed and (packed.shape, packed.order, packed.dtype, packed.largest))
            kept.append(x if packed is None else packed.data)
        # Saved like the rest, so that they go when the rest goes.
        ctx.save_for_backward(*kept, *parameters, *statistics)
        ctx.counts = (count, count + len(parameters))
        made = [y for y in leaves if isinstance(y, Tensor)]
        storages = Counter(x.untyped_storage()._cdata for x in (*inputs, *made))
        results = tuple(as_its_own(y) if storages[y.untyped_storage()._cdata] == 1 else y for y in made)
        ctx.mark_non_differentiable(*(y for y in results if not (y.is_floating_point() or y.is_complex())))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        what = "what backward computes again"
        refuse_second_derivative(what, "Convert with checkpoint=None, lower=None: PyTorch keeps a history then.")
        call: SegmentCall = ctx.call
        saved, (first, second) = ctx.saved_tensors, ctx.counts
        inputs: list[Any] = [
            x if packed is None else PackedTensor(x, *packed)
            for x, packed in zip(saved[:first], ctx.packed, strict=True)
        ]
        remaining = iter(grads)
        each = [next(remaining) if is_tensor else None for is_tensor, _ in call.results]
        of_tensors, of_parameters = backward(
            call, inputs, saved[first:second], saved[second:], ctx.needs_input_grad[1:], each
        )
        return None, *of_tensors, *of_parameters
