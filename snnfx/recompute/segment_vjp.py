"""The backward pass of a segment: its slices are run again for their vector-Jacobian products.

With statistics there are two passes over the slices. The first one goes back through the tile; it gives the gradient of
what was normalised, and that of the statistics, which is complete only when all slices are through. The second one adds
what comes through the statistics and goes back through the products. Without statistics one pass does both. Slices of
time are taken from the last one to the first; the gradient of a loop's state is handed from slice to slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from snnfx.recompute.autograd_entry import attach_to_graph
from snnfx.recompute.batch_statistics import add_gradient_of_statistics, step_statistics
from snnfx.recompute.bit_packing import PackedTensor
from snnfx.recompute.packed_inputs import with_packed_inputs
from snnfx.recompute.segment import TILE, SegmentCall, TileCall, run_slice
from snnfx.recompute.tile import Joined, TileSlice, cut, cut_state, run_tile, slices_of
from snnfx.sandbox.torch_internals import pytree

__all__ = ["backward"]

Key = tuple[Any, int]
"""A tensor: the number of its value, or ("state", number of the loop), and its place among the leaves of the value."""

Tokens = list[tuple[Key, Any]]
"""Where tensors enter a history, or their gradients. One may enter twice: in a product and in the tile behind it."""


def backward(
    call: SegmentCall,
    tensors: Sequence[Any],
    parameters: Sequence[Tensor],
    statistics: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of the tensors and of the parameters.

    Args:
        call: of the forward pass.
        tensors, parameters: what it was given.
        statistics: mean and variance of each call that took some.
        needs: which of the tensors and parameters need a gradient.
        grads: of the sequences and final states.
    """
    run = _SegmentBackward(call, tensors, parameters, statistics, needs)
    run.through(grads)
    return [run.found_of(key) for key in run.keys], run.of_parameters


@dataclass
class _SliceGraph:
    """A call of a product with what autograd keeps of it."""

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
        self.values: dict[int, Any] = dict(enumerate(call.values(tensors)))
        places = [(n, i, leaf) for n, v in self.values.items() for i, leaf in enumerate(pytree.tree_leaves(v))]
        self.keys: list[Key] = [(n, i) for n, i, leaf in places if isinstance(leaf, Tensor | PackedTensor)]
        self.needed = {key for key, need in zip(self.keys, needs, strict=False) if need}
        self.own = [p.detach().requires_grad_(n) for p, n in zip(parameters, needs[len(tensors) :], strict=True)]
        self.ends = [(i, p) for i, p in enumerate(self.own) if p.requires_grad]
        self.of_parameters: list[Tensor | None] = [None] * len(self.own)
        self.found: dict[Key, Tensor] = {}
        self.slices: dict[Key, Joined] = {}  # of what is gone through now
        self.sequences: set[int] = set()
        self.unbatched: set[int] = set()
        for c in (*self.segment.products, self.segment.tile):
            self.sequences.update((*c.sequences, *c.makes))
            self.unbatched.update(n for n, batched in zip(c.sequences, c.tile.batched, strict=True) if not batched)
        for product, flows in zip(self.segment.products, call.flows, strict=True):
            if flows:
                self.needed.update((n, 0) for n in product.makes)
        kept = iter(statistics)
        for taken in self.segment.statistics:
            for n in taken.makes:
                self.values[n] = next(kept)
                if call.live[taken.makes[0]] and (taken.x, 0) in self.needed:
                    self.needed.add((n, 0))

    def found_of(self, key: Key) -> Tensor | None:
        """The gradient of a tensor."""
        return self.found.get(key)

    def through(self, grads: Sequence[Tensor | None]) -> None:
        """Go back through the segment."""
        segment, call = self.segment, self.call
        if not segment.statistics:
            with call.as_then(self.own, TILE):
                self._slices(segment.joint, grads)
            return
        histories: dict[int, list[_SliceGraph]] = {}
        if segment.products and not segment.twice:
            for number, product in enumerate(segment.products):
                with call.as_then(self.own, number):
                    histories[number] = self._once_more(product)
        with call.as_then(self.own, TILE):
            self._slices((*segment.products, segment.tile) if segment.twice else (segment.tile,), grads)
        made = {n for product in segment.products for n in product.makes}
        for x in dict.fromkeys(taken.x for taken in segment.statistics if taken.x not in made):
            if (x, 0) in self.found:
                self._add_statistics(x, TileSlice(), cut(self.values[x], TileSlice()), self.found_of((x, 0)))
        for number, product in enumerate(segment.products):
            if call.flows[number]:
                with call.as_then(self.own, number):
                    self._back_through(product, histories.pop(number, None))

    # -- the first pass ---------------------------------------------------------------------------------------------

    def _slices(self, calls: Sequence[TileCall], grads: Sequence[Tensor | None]) -> None:
        """Back through some calls, slice by slice. The products of a segment with statistics are only computed."""
        last, (samples, steps) = calls[-1], self.call.lengths(calls, self.values)
        before = [self.values[s] if isinstance(s, int) else s for s in last.states]
        count = self.call.sequences
        for of_samples in slices_of(self.call.N, samples):
            part = TileSlice(of_samples, of=self.call.N)
            of_finals = [None if g is None else cut_state(g, part) for g in grads[count:]]
            states = [cut_state(s, part) for s in before]
            of_states = self._over_time(calls, part, steps, grads[:count], of_finals, states)
            for (n, place), grad in of_states.items():
                self._add_state((last.states[n], place), grad, part)
        self._join()

    def _over_time(
        self,
        calls: Sequence[TileCall],
        part: TileSlice,
        steps: int | None,
        of_outputs: Sequence[Tensor | None],
        of_finals: Sequence[Tensor | None],
        states: list[Any],
    ) -> dict[Key, Tensor | None]:
        """Back through the time of some samples; the gradients of the states before the first step."""
        parts = [TileSlice(part.samples, of_steps, part.of) for of_steps in slices_of(self.call.T, steps)]
        borders = [states]
        for one in parts[:-1]:
            with torch.no_grad():
                borders.append(list(run_slice(calls, self.values, one, borders[-1])[1]))
        of_states: dict[Key, Tensor | None] = {}
        for number in range(len(parts) - 1, -1, -1):
            one, before = parts[number], borders.pop()
            after = [None if g is None else cut(g, one) for g in of_outputs]
            # The state at an inner border is a value of its own; the first one came from outside.
            of_states = self._back(calls, one, before, [*after, *of_finals], everywhere=number > 0)
            of_finals = [of_states.get((n, i)) for n, s in enumerate(before) for i in range(len(pytree.tree_leaves(s)))]
        return of_states

    def _back(
        self,
        calls: Sequence[TileCall],
        part: TileSlice,
        states: Sequence[Any],
        given: Sequence[Tensor | None],
        everywhere: bool,
    ) -> dict[Key, Tensor | None]:
        """The vector-Jacobian product of one slice."""
        tokens: Tokens = []
        edges = self._with_history(calls, part, states, tokens, everywhere)
        of_states: dict[Key, Tensor | None] = {}
        grads = self._gradients(edges, given, tokens)
        of_values: Tokens = []
        for (key, _), grad in zip(tokens, grads, strict=True):
            if isinstance(key[0], tuple):
                of_states[key[0][1], key[1]] = grad
            else:
                of_values.append((key, grad))
        self._add(of_values, part)
        return of_states

    def _gradients(
        self, edges: Sequence[GradientEdge | None], given: Sequence[Tensor | None], tokens: Tokens
    ) -> list[Tensor | None]:
        """Of the tokens; those of the parameters are added up."""
        pairs = [(e, g) for e, g in zip(edges, given, strict=True) if e is not None and g is not None]
        ends = [*(token for _, token in tokens), *(p for _, p in self.ends)]
        if not pairs or not ends:
            return [None] * len(tokens)
        grads = torch.autograd.grad([e for e, _ in pairs], ends, [g for _, g in pairs], allow_unused=True)
        for (i, _), grad in zip(self.ends, grads[len(tokens) :], strict=True):
            if grad is not None:
                before = self.of_parameters[i]
                self.of_parameters[i] = grad if before is None else before + grad
        return list(grads[: len(tokens)])

    def _with_history(
        self,
        calls: Sequence[TileCall],
        part: TileSlice,
        states: Sequence[Any],
        tokens: Tokens,
        everywhere: bool,
    ) -> list[GradientEdge | None]:
        """Run a slice with a history: the edges of its results. Only the history holds what was computed."""
        entered: dict[int, Tensor] = {}
        result: Any = ((), ())
        for call in calls:
            is_last = call is calls[-1]
            only_computed = not is_last and bool(self.segment.statistics)
            with torch.set_grad_enabled(not only_computed):
                sequences = []
                for n, batched in zip(call.sequences, call.tile.batched, strict=True):
                    if n not in entered:
                        x = cut(self.values[n], part, batched)
                        if only_computed:
                            # The tile may read it as well, and then goes back to it.
                            sequences.append(x)
                            continue
                        entered[n] = self._entered((n, 0), x, tokens)
                    sequences.append(entered[n] if not is_last else entered.pop(n))
                constants = [self._constant(n, tokens) for n in call.constants]
                given = self._states(states, tokens, everywhere) if is_last else call.states
                result = run_tile(call.tile, sequences, given, constants)
            del sequences
            for n, y in zip(call.makes, result[0], strict=True) if not is_last else ():
                entered[n] = self._entered((n, 0), y, tokens) if only_computed else y
        return [_edge(y) for y in pytree.tree_leaves(result)]

    def _entered(self, key: Key, x: Any, tokens: Tokens) -> Any:
        if key not in self.needed or not (x.is_floating_point() or x.is_complex()):
            return x
        with torch.enable_grad():
            token, x = attach_to_graph(x.detach())
        tokens.append((key, token))
        return x

    def _constant(self, number: int, tokens: Tokens) -> Any:
        value = self.values[number]
        if isinstance(value, Tensor):
            return self._entered((number, 0), value, tokens)
        if isinstance(value, nn.Module) or not any(n == number for n, _ in self.needed):
            return value
        leaves, spec = pytree.tree_flatten(value)
        leaves = [self._entered((number, i), x, tokens) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
        return pytree.tree_unflatten(leaves, spec)

    def _states(self, states: Sequence[Any], tokens: Tokens, everywhere: bool) -> list[Any]:
        found = []
        for n, (state, source) in enumerate(zip(states, self.segment.tile.states, strict=True)):
            leaves, spec = pytree.tree_flatten(state)
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and (everywhere or (source, i) in self.needed):
                    with torch.enable_grad():
                        token, leaves[i] = attach_to_graph(leaf.detach())
                    tokens.append(((("state", n), i), token))
            found.append(pytree.tree_unflatten(leaves, spec))
        return found

    # -- the second pass --------------------------------------------------------------------------------------------

    def _once_more(self, product: TileCall) -> list[_SliceGraph]:
        """Compute a product again, with a history that keeps its sequences packed."""
        samples, steps = self.call.lengths([product], self.values)
        joined = [Joined(self.call.T) for _ in product.makes]
        found = []
        for of_samples in slices_of(self.call.N, samples):
            for of_steps in slices_of(self.call.T, steps):
                part = TileSlice(of_samples, of_steps, self.call.N)
                made, history = self._with_packed_history(product, part)
                for whole, y in zip(joined, made, strict=True):
                    whole.add(y, part)
                found.append(history)
        self.values.update(zip(product.makes, (whole.whole for whole in joined), strict=True))
        return found

    def _with_packed_history(self, product: TileCall, part: TileSlice) -> tuple[list[Tensor], _SliceGraph]:
        tokens: Tokens = []
        pairs = []
        with torch.enable_grad():
            sequences = []
            for n, batched in zip(product.sequences, product.tile.batched, strict=True):
                x = cut(self.values[n], part, batched)
                if isinstance(self.values[n], PackedTensor) and (part.samples is None or self.values[n].has_samples):
                    pairs.append((x, _slicer(self.values[n], part)))
                sequences.append(self._entered((n, 0), x, tokens))
            constants = [self._constant(n, tokens) for n in product.constants]
            with with_packed_inputs(pairs):
                made, _ = run_tile(product.tile, sequences, product.states, constants)
        return [y.detach() for y in made], _SliceGraph(part, [_edge(y) for y in made], tokens)

    def _back_through(self, product: TileCall, histories: list[_SliceGraph] | None) -> None:
        """Back through a product, whose results have their gradient but for what comes through the statistics."""
        wholes = {n: self.found_of((n, 0)) for n in product.makes}
        if histories is None:
            samples, steps = self.call.lengths((*self.segment.products, self.segment.tile), self.values)
            N, T = self.call.N, self.call.T
            parts = [TileSlice(a, b, N) for a in slices_of(N, samples) for b in slices_of(T, steps)]
        for item in histories if histories is not None else parts:
            if isinstance(item, TileSlice):
                made, history = self._with_packed_history(product, item)
            else:
                history = item
                made = [cut(self.values[n], history.part) for n in product.makes]
            given = []
            for n, x in zip(product.makes, made, strict=True):
                whole = wholes[n]
                grad = None if whole is None else cut(whole, history.part)
                self._add_statistics(n, history.part, x, grad)
                given.append(grad)
            del made, x
            grads = self._gradients(history.edges, given, history.tokens)
            self._add([(key, grad) for (key, _), grad in zip(history.tokens, grads, strict=True)], history.part)
        self._join()
        for n in product.makes:
            self.found.pop((n, 0), None)
            self.values.pop(n, None)

    def _add_statistics(self, x: int, part: TileSlice, value: Tensor, grad: Tensor | None) -> None:
        """Add what comes through statistics of a value to its gradient."""
        for taken in self.segment.statistics:
            if taken.x != x or grad is None:
                continue
            mean, var = taken.makes
            of_mean, of_var = self.found_of((mean, 0)), self.found_of((var, 0))
            if of_mean is None or of_var is None:
                continue
            per_step = taken.function is step_statistics
            count = part.all_rows(value.shape[1]) * value[0, 0, 0].numel() * (1 if per_step else self.call.T)
            here = [v if not per_step else cut(v, part, False) for v in (self.values[mean], of_mean, of_var)]
            add_gradient_of_statistics(grad, value, here[0], here[1], here[2], count)

    # -- what was found ---------------------------------------------------------------------------------------------

    def _add(self, grads: Tokens, part: TileSlice) -> None:
        """The gradients of one slice."""
        total: dict[Key, Tensor | None] = {}
        for key, grad in grads:
            total[key] = _sum(total.get(key), grad)
        for key, grad in total.items():
            if key[0] in self.sequences:
                joined = self.slices.setdefault(key, Joined(self.call.T, key[0] not in self.unbatched))
                joined.add(grad, part)
            elif grad is not None:
                self.found[key] = _sum(self.found.get(key), grad)  # type: ignore[assignment]

    def _join(self) -> None:
        """All slices are through."""
        for key, joined in self.slices.items():
            if joined.whole is not None:
                self.found[key] = _sum(self.found.get(key), joined.whole)  # type: ignore[assignment]
        self.slices.clear()

    def _add_state(self, key: Key, grad: Tensor | None, part: TileSlice) -> None:
        if grad is None:
            return
        if part.samples is None:
            self.found[key] = grad
            return
        if key not in self.found:
            self.found[key] = grad.new_zeros((self.call.N, *grad.shape[1:]))
        self.found[key][slice(*part.samples)] = grad


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _edge(y: Any) -> GradientEdge | None:
    return get_gradient_edge(y) if isinstance(y, Tensor) and y.requires_grad else None


def _slicer(packed: PackedTensor, part: TileSlice) -> Any:
    def sliced() -> PackedTensor:
        found = packed if part.steps is None else packed.steps(*part.steps)
        return found if part.samples is None else found.samples(*part.rows(found.shape[1]))

    return sliced
