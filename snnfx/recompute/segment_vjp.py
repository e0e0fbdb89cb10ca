"""The backward pass of a segment: run its slices again and take their vector-Jacobian products.

With batch statistics there are two passes over the slices. The first pass differentiates the tile: it gives the
gradients of the normalised sequence and of the statistics, which are complete only after the last slice. The second
pass adds the gradient through the statistics and differentiates the products. Without statistics one pass does both.
Slices of time run from the last to the first; each slice passes the gradient of a loop's state to the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from snnfx.recompute.attach_to_graph import attach_to_graph
from snnfx.recompute.batch_statistics import add_gradient_of_statistics, step_statistics
from snnfx.recompute.bit_packing import PackedTensor
from snnfx.recompute.packed_saved_tensors import saving_packed
from snnfx.recompute.segment import TILE, SegmentCall, TileCall, run_slice
from snnfx.recompute.tile import JoinedSlices, TileSlice, run_tile, slice_ranges, slice_sequence, slice_state
from snnfx.sandbox.torch_internals import pytree

__all__ = ["backward"]

Key = tuple[Any, int]
"""A tensor: the number of its value, or ("state", index of the loop), and its index among the leaves of the value."""

Tokens = list[tuple[Key, Any]]
"""Leaves of an autograd graph, or their gradients, by tensor. A tensor may have two: in a product and in the tile."""


def backward(
    call: SegmentCall,
    tensors: Sequence[Any],
    parameters: Sequence[Tensor],
    statistics: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the input tensors and of the parameters of a segment.

    Args:
        call: the forward run.
        tensors, parameters: its inputs.
        statistics: mean and variance of each statistics call.
        needs: which of the tensors and parameters need a gradient.
        grads: the gradients of the output sequences and final states.
    """
    run = _SegmentBackward(call, tensors, parameters, statistics, needs)
    run.backward(grads)
    return [run.grads.get(key) for key in run.keys], run.grads_of_parameters


@dataclass
class _SliceGraph:
    """The autograd graph of one slice of a product."""

    part: TileSlice
    edges: list[GradientEdge | None]
    tokens: Tokens


class _SegmentBackward:
    def __init__(
        self,
        call: SegmentCall,
        tensors: Sequence[Any],
        parameters: Sequence[Tensor],
        statistics: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> None:
        self.call, self.segment = call, call.segment
        needs_of_parameters = needs[len(tensors) :]
        self.parameters = [p.detach().requires_grad_(n) for p, n in zip(parameters, needs_of_parameters, strict=True)]
        self.replicas = call.modules.replicas(self.parameters, call.buffers)
        values = pytree.tree_map_only(nn.Module, self.replicas.of, call.values(tensors))
        self.values: dict[int, Any] = dict(enumerate(values))
        leaves = [(n, i, leaf) for n, v in self.values.items() for i, leaf in enumerate(pytree.tree_leaves(v))]
        self.keys: list[Key] = [(n, i) for n, i, leaf in leaves if isinstance(leaf, Tensor | PackedTensor)]
        self.needed = {key for key, need in zip(self.keys, needs, strict=False) if need}
        self.trained = [(i, p) for i, p in enumerate(self.parameters) if p.requires_grad]
        self.grads_of_parameters: list[Tensor | None] = [None] * len(self.parameters)
        self.grads: dict[Key, Tensor] = {}
        self.joined_grads: dict[Key, JoinedSlices] = {}  # of the pass over the slices that runs now
        self.sequences: set[int] = set()
        self.unbatched: set[int] = set()
        for c in self.segment.calls:
            self.sequences.update((*c.sequences, *c.outputs))
            self.unbatched.update(n for n, batched in zip(c.sequences, c.tile.batched, strict=True) if not batched)
        for product, needs_gradient in zip(self.segment.products, call.needs_gradient, strict=True):
            if needs_gradient:
                self.needed.update((n, 0) for n in product.outputs)
        remaining = iter(statistics)
        for statistic in self.segment.statistics:
            for n in statistic.outputs:
                self.values[n] = next(remaining)
                if call.from_batch[statistic.outputs[0]] and (statistic.x, 0) in self.needed:
                    self.needed.add((n, 0))

    def backward(self, grads: Sequence[Tensor | None]) -> None:
        """Differentiate the segment, given the gradients of its results."""
        segment, call = self.segment, self.call
        if not segment.statistics:
            with call.replayed(self.replicas, TILE):
                self._run_slices(segment.fused_calls, grads)
            return
        twice = segment.recompute_products_twice
        graphs: dict[int, list[_SliceGraph]] = {}
        if segment.products and not twice:
            for index, product in enumerate(segment.products):
                with call.replayed(self.replicas, index):
                    graphs[index] = self._recompute_product(product)
        with call.replayed(self.replicas, TILE):
            self._run_slices(segment.calls if twice else (segment.tile,), grads)
        outputs = {n for product in segment.products for n in product.outputs}
        for x in dict.fromkeys(c.x for c in segment.statistics if c.x not in outputs):
            if (x, 0) in self.grads:
                value = slice_sequence(self.values[x], TileSlice())
                self._add_through_statistics(x, TileSlice(), value, self.grads.get((x, 0)))
                del value
        for index, product in enumerate(segment.products):
            if call.needs_gradient[index]:
                with call.replayed(self.replicas, index):
                    self._differentiate_product(product, graphs.pop(index, None))

    # -- the first pass ---------------------------------------------------------------------------------------------

    def _run_slices(self, calls: Sequence[TileCall], grads: Sequence[Tensor | None]) -> None:
        """Differentiate calls slice by slice. In a segment with statistics, products run without autograd here."""
        last, (samples, steps) = calls[-1], self.call.slice_lengths(calls, self.values)
        initial = [self.values[s] if isinstance(s, int) else s for s in last.states]
        count = self.call.sequence_count
        for sample_range in slice_ranges(self.call.N, samples):
            part = TileSlice(sample_range, of=self.call.N)
            grads_of_finals = [None if g is None else slice_state(g, part) for g in grads[count:]]
            states = [slice_state(s, part) for s in initial]
            grads_of_states = self._run_steps(calls, part, steps, grads[:count], grads_of_finals, states)
            for (n, leaf), grad in grads_of_states.items():
                self._add_state_gradient((last.states[n], leaf), grad, part)
        self._finish_pass()

    def _run_steps(
        self,
        calls: Sequence[TileCall],
        part: TileSlice,
        steps: int | None,
        grads_of_outputs: Sequence[Tensor | None],
        grads_of_finals: Sequence[Tensor | None],
        states: list[Any],
    ) -> dict[Key, Tensor | None]:
        """Differentiate the time slices of some samples: the gradients of the states before the first step."""
        parts = [TileSlice(part.samples, step_range, part.of) for step_range in slice_ranges(self.call.T, steps)]
        checkpoints = [states]
        for one in parts[:-1]:
            with torch.no_grad():
                checkpoints.append(list(run_slice(calls, self.values, one, checkpoints[-1])[1]))
        grads_of_states: dict[Key, Tensor | None] = {}
        for index in range(len(parts) - 1, -1, -1):
            one, before = parts[index], checkpoints.pop()
            grads = [None if g is None else slice_sequence(g, one) for g in grads_of_outputs]
            # A state between slices always needs its gradient; the first one only if the caller needs it.
            grads_of_states = self._run_slice(calls, one, before, [*grads, *grads_of_finals], all_states=index > 0)
            grads_of_finals = [
                grads_of_states.get((n, i)) for n, s in enumerate(before) for i in range(len(pytree.tree_leaves(s)))
            ]
        return grads_of_states

    def _run_slice(
        self,
        calls: Sequence[TileCall],
        part: TileSlice,
        states: Sequence[Any],
        grads: Sequence[Tensor | None],
        all_states: bool,
    ) -> dict[Key, Tensor | None]:
        """The vector-Jacobian product of one slice; returns the gradients of the states before it."""
        tokens: Tokens = []
        edges = self._record_slice(calls, part, states, tokens, all_states)
        grads_of_states: dict[Key, Tensor | None] = {}
        grads_of_tokens = self._gradients(edges, grads, tokens)
        grads_of_values: Tokens = []
        for (key, _), grad in zip(tokens, grads_of_tokens, strict=True):
            if isinstance(key[0], tuple):
                grads_of_states[key[0][1], key[1]] = grad
            else:
                grads_of_values.append((key, grad))
        self._add(grads_of_values, part)
        return grads_of_states

    def _gradients(
        self, edges: Sequence[GradientEdge | None], grads_of_edges: Sequence[Tensor | None], tokens: Tokens
    ) -> list[Tensor | None]:
        """The gradients of the tokens; gradients of the parameters are accumulated."""
        pairs = [(e, g) for e, g in zip(edges, grads_of_edges, strict=True) if e is not None and g is not None]
        leaves = [*(token for _, token in tokens), *(p for _, p in self.trained)]
        if not pairs or not leaves:
            return [None] * len(tokens)
        grads = torch.autograd.grad([e for e, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        for (i, _), grad in zip(self.trained, grads[len(tokens) :], strict=True):
            if grad is not None:
                total = self.grads_of_parameters[i]
                self.grads_of_parameters[i] = grad if total is None else total + grad
        return list(grads[: len(tokens)])

    def _record_slice(
        self,
        calls: Sequence[TileCall],
        part: TileSlice,
        states: Sequence[Any],
        tokens: Tokens,
        all_states: bool,
    ) -> list[GradientEdge | None]:
        """Run a slice with autograd: the edges of its results. Only the graph keeps intermediates alive."""
        inputs: dict[int, Tensor] = {}
        result: Any = ((), ())
        for call in calls:
            is_last = call is calls[-1]
            without_grad = not is_last and bool(self.segment.statistics)
            with torch.set_grad_enabled(not without_grad):
                sequences = []
                for n, batched in zip(call.sequences, call.tile.batched, strict=True):
                    if n not in inputs:
                        x = slice_sequence(self.values[n], part, batched)
                        if without_grad:
                            # Not attached here: the tile may read it too, and then needs its gradient.
                            sequences.append(x)
                            continue
                        inputs[n] = self._attach((n, 0), x, tokens)
                    sequences.append(inputs[n] if not is_last else inputs.pop(n))
                constants = [self._attach_constant(n, tokens) for n in call.constants]
                before = self._attach_states(states, tokens, all_states) if is_last else call.states
                result = run_tile(call.tile, sequences, before, constants)
            del sequences
            for n, y in zip(call.outputs, result[0], strict=True) if not is_last else ():
                inputs[n] = self._attach((n, 0), y, tokens) if without_grad else y
        return [_edge(y) for y in pytree.tree_leaves(result)]

    def _attach(self, key: Key, x: Any, tokens: Tokens) -> Any:
        if key not in self.needed or not (x.is_floating_point() or x.is_complex()):
            return x
        with torch.enable_grad():
            token, x = attach_to_graph(x.detach())
        tokens.append((key, token))
        return x

    def _attach_constant(self, number: int, tokens: Tokens) -> Any:
        value = self.values[number]
        if isinstance(value, Tensor):
            return self._attach((number, 0), value, tokens)
        if isinstance(value, nn.Module) or not any(n == number for n, _ in self.needed):
            return value
        leaves, spec = pytree.tree_flatten(value)
        leaves = [self._attach((number, i), x, tokens) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
        return pytree.tree_unflatten(leaves, spec)

    def _attach_states(self, states: Sequence[Any], tokens: Tokens, all_states: bool) -> list[Any]:
        attached = []
        for n, (state, source) in enumerate(zip(states, self.segment.tile.states, strict=True)):
            leaves, spec = pytree.tree_flatten(state)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and (all_states or (source, i) in self.needed):
                    with torch.enable_grad():
                        token, leaves[i] = attach_to_graph(leaf.detach())
                    tokens.append(((("state", n), i), token))
            attached.append(pytree.tree_unflatten(leaves, spec))
        return attached

    # -- the second pass --------------------------------------------------------------------------------------------

    def _recompute_product(self, product: TileCall) -> list[_SliceGraph]:
        """Recompute a product with autograd, which saves its input sequences in packed form."""
        samples, steps = self.call.slice_lengths([product], self.values)
        joined = [JoinedSlices(self.call.T) for _ in product.outputs]
        graphs = []
        for sample_range in slice_ranges(self.call.N, samples):
            for step_range in slice_ranges(self.call.T, steps):
                part = TileSlice(sample_range, step_range, self.call.N)
                outputs, graph = self._record_product(product, part)
                for sequence, y in zip(joined, outputs, strict=True):
                    sequence.add(y, part)
                graphs.append(graph)
        self.values.update(zip(product.outputs, (sequence.whole for sequence in joined), strict=True))
        return graphs

    def _record_product(self, product: TileCall, part: TileSlice) -> tuple[list[Tensor], _SliceGraph]:
        tokens: Tokens = []
        packers = []
        with torch.enable_grad():
            sequences = []
            for n, batched in zip(product.sequences, product.tile.batched, strict=True):
                x = slice_sequence(self.values[n], part, batched)
                if isinstance(self.values[n], PackedTensor) and (part.samples is None or self.values[n].has_samples):
                    packers.append((x, _packed_slice(self.values[n], part)))
                sequences.append(self._attach((n, 0), x, tokens))
            constants = [self._attach_constant(n, tokens) for n in product.constants]
            with saving_packed(packers):
                outputs, _ = run_tile(product.tile, sequences, product.states, constants)
        return [y.detach() for y in outputs], _SliceGraph(part, [_edge(y) for y in outputs], tokens)

    def _differentiate_product(self, product: TileCall, graphs: list[_SliceGraph] | None) -> None:
        """Differentiate a product whose results have their gradient, except for the part through the statistics."""
        wholes = {n: self.grads.get((n, 0)) for n in product.outputs}
        if graphs is None:
            samples, steps = self.call.slice_lengths(self.segment.calls, self.values)
            N, T = self.call.N, self.call.T
            parts = [TileSlice(a, b, N) for a in slice_ranges(N, samples) for b in slice_ranges(T, steps)]
        for item in graphs if graphs is not None else parts:
            if isinstance(item, TileSlice):
                outputs, graph = self._record_product(product, item)
            else:
                graph = item
                outputs = [slice_sequence(self.values[n], graph.part) for n in product.outputs]
            grads_of_outputs = []
            for n, y in zip(product.outputs, outputs, strict=True):
                whole = wholes[n]
                grad = None if whole is None else slice_sequence(whole, graph.part)
                self._add_through_statistics(n, graph.part, y, grad)
                grads_of_outputs.append(grad)
            del outputs, y
            grads = self._gradients(graph.edges, grads_of_outputs, graph.tokens)
            self._add([(key, grad) for (key, _), grad in zip(graph.tokens, grads, strict=True)], graph.part)
        self._finish_pass()
        for n in product.outputs:
            self.grads.pop((n, 0), None)
            self.values.pop(n, None)

    def _add_through_statistics(self, x: int, part: TileSlice, value: Tensor, grad: Tensor | None) -> None:
        """Add the gradient through the statistics of a value to its gradient, in place."""
        for call in self.segment.statistics:
            if call.x != x or grad is None:
                continue
            mean, var = call.outputs
            grad_of_mean, grad_of_var = self.grads.get((mean, 0)), self.grads.get((var, 0))
            if grad_of_mean is None or grad_of_var is None:
                continue
            per_step = call.function is step_statistics
            count = part.full_size(value.shape[1]) * value[0, 0, 0].numel() * (1 if per_step else self.call.T)
            of_slice = [
                v if not per_step else slice_sequence(v, part, False)
                for v in (self.values[mean], grad_of_mean, grad_of_var)
            ]
            add_gradient_of_statistics(grad, value, of_slice[0], of_slice[1], of_slice[2], count)

    # -- accumulation -----------------------------------------------------------------------------------------------

    def _add(self, grads: Tokens, part: TileSlice) -> None:
        """Accumulate the gradients of one slice."""
        total: dict[Key, Tensor | None] = {}
        for key, grad in grads:
            total[key] = _sum(total.get(key), grad)
        for key, grad in total.items():
            if key[0] in self.sequences:
                joined = self.joined_grads.setdefault(key, JoinedSlices(self.call.T, key[0] not in self.unbatched))
                joined.add(grad, part)
            elif grad is not None:
                self.grads[key] = _sum(self.grads.get(key), grad)  # type: ignore[assignment]

    def _finish_pass(self) -> None:
        """Add the joined gradients after the last slice."""
        for key, joined in self.joined_grads.items():
            if joined.whole is not None:
                self.grads[key] = _sum(self.grads.get(key), joined.whole)  # type: ignore[assignment]
        self.joined_grads.clear()

    def _add_state_gradient(self, key: Key, grad: Tensor | None, part: TileSlice) -> None:
        if grad is None:
            return
        if part.samples is None:
            self.grads[key] = grad
            return
        if key not in self.grads:
            self.grads[key] = grad.new_zeros((self.call.N, *grad.shape[1:]))
        self.grads[key][slice(*part.samples)] = grad


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _edge(y: Any) -> GradientEdge | None:
    return get_gradient_edge(y) if isinstance(y, Tensor) and y.requires_grad else None


def _packed_slice(packed: PackedTensor, part: TileSlice) -> Any:
    def slice_packed() -> PackedTensor:
        of_steps = packed if part.steps is None else packed.steps(*part.steps)
        return of_steps if part.samples is None else of_steps.samples(*part.rows(of_steps.shape[1]))

    return slice_packed
