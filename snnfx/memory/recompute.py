"""Computing again in the backward pass what the forward pass did not keep.

Revolve and its kin trade recomputation for memory (Griewank & Walther 2000; Chen et al. 2016). Here a segment is a few
region calls of an emitted graph. Forward runs them without a history and keeps what enters the segment, spikes packed
in bits; backward runs them again, stage by stage, and takes vector-Jacobian products. A stage may go through its
sequence in chunks: then a loop keeps only its state at the borders of the chunks, and of its insides one chunk is alive
at a time (Gruslys et al. 2016). State is a value, so nothing has to be put back afterwards; what a second run could
change or see differently is replayed: random numbers, autocast, the mode of modules, and buffers, which it gets as
copies (running statistics move once).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from snnfx.isolation import RandomState, random_state
from snnfx.memory.packing import PackedTensor, pack
from snnfx.memory.replay import Autocast, Modules, drawing_from, parameters_of
from snnfx.memory.staging import empty_like, keys_of, steps_of, unpacked
from snnfx.memory.vjp import backward
from snnfx.state import has_forward_hooks

__all__ = ["Segment", "run_segment"]


class Segment(nn.Module):
    """A few calls of an emitted graph that are run again in backward.

    Args:
        label: for messages.
        graph: placeholders (anything), calls and getitems, a tuple of values as output.
        chunks: time steps at once, by name of a call; the others take the whole sequence. A call in chunks is
            `target((x_seq, ...), ...)`, with `state=` if it is a loop.
        packed: the largest whole number in a placeholder's sequence, by name, for those that are kept packed.
        still_packable: whether the proof of that holds at this call (a neuron's settings are live).
        random: names of the calls that draw random numbers.
    """

    def __init__(
        self,
        label: str,
        graph: fx.Graph,
        chunks: Mapping[str, int],
        packed: Mapping[str, int],
        still_packable: Callable[[], bool],
        random: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.label, self.graph, self.random = label, graph, random
        self.chunks, self.packed, self.still_packable = dict(chunks), dict(packed), still_packable
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.stages = [n for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
        self.last_use: dict[Node, list[Node]] = {}
        seen: set[Node] = set()
        for node in reversed(graph.nodes):
            dead = [n for n in node.all_input_nodes if n not in seen]
            seen.update(dead)
            self.last_use[node] = dead

    def plainly(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Run it with the history that autograd keeps."""
        env: dict[Node, Any] = dict(zip(self.placeholders, values, strict=True))
        for node in self.graph.nodes:
            if node.op == "output":
                return tuple(map_arg(node.args[0], env.__getitem__))
            if node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
            for dead in self.last_use[node]:
                del env[dead]
        raise AssertionError("a graph has an output")


def run_segment(segment: Segment, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Run a segment so that its backward pass computes it again.

    It keeps its history as usual where that cannot be done: under torch.compile (whose own partitioner decides what to
    compute again), under transforms of torch.func, and while a module in it has forward hooks, which would fire twice.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return segment.plainly(values)
    leaves, spec = pytree.tree_flatten(values)
    modules = [m for leaf in leaves if isinstance(leaf, nn.Module) for m in leaf.modules()]
    parameters = parameters_of(modules)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not any(t.requires_grad for t in (*tensors, *parameters)) or any(map(has_forward_hooks, modules)):
        return segment.plainly(values)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    statics = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    call = Call(segment, statics, spec, positions, Modules(modules, parameters))
    found = iter(_Recompute.apply(call, *tensors, *parameters))
    return pytree.tree_unflatten(  # type: ignore[no-any-return]
        [next(found) if is_tensor else value for is_tensor, value in call.results], call.result_spec
    )


class _Held:
    """Stands for a tensor that autograd holds."""


@dataclass
class Call:
    """One run of a segment, and what its backward pass needs to know."""

    segment: Segment
    statics: list[Any]
    spec: pytree.TreeSpec
    tensor_positions: list[int]
    modules: Modules
    results: list[tuple[bool, Any]] = field(default_factory=list)
    result_spec: Any = None
    keys: dict[Node, Any] = field(default_factory=dict)
    buffers: dict[Node, list[Any]] = field(default_factory=dict)
    generators: dict[Node, RandomState] = field(default_factory=dict)
    borders: dict[Node, list[Any]] = field(default_factory=dict)
    autocast: Autocast = field(default_factory=Autocast)

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """What the placeholders are given."""
        leaves = list(self.statics)
        for position, value in zip(self.tensor_positions, tensors, strict=True):
            leaves[position] = value
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]

    def packable(self, tensors: Sequence[Tensor]) -> list[int]:
        """The largest whole number in each tensor that is to be packed, 0 for the others."""
        segment = self.segment
        proven = segment.packed if segment.packed and segment.still_packable() else {}
        by_tensor = {
            id(v): proven.get(n.name, 0) for n, v in zip(segment.placeholders, self.values(tensors), strict=True)
        }
        return [by_tensor.get(id(x), 0) for x in tensors]

    def forward(self, tensors: Sequence[Tensor]) -> Any:
        """Run the stages without a history."""
        segment = self.segment
        env: dict[Node, Any] = dict(zip(segment.placeholders, self.values(tensors), strict=True))
        for node in segment.placeholders:
            self.keys[node] = keys_of(env[node])
        for node in segment.graph.nodes:
            if node.op == "output":
                self.keys[node] = map_arg(node.args[0], self.keys.__getitem__)
                return tuple(map_arg(node.args[0], env.__getitem__))
            if node.op == "call_function":
                self._forward_node(node, env)
            for dead in segment.last_use[node]:
                del env[dead]
        raise AssertionError("a graph has an output")

    def _forward_node(self, node: Any, env: dict[Node, Any]) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        if node.target is operator.getitem:
            source: Any = node.args[0]
            index: Any = args[1]
            env[node] = args[0][index]
            self.keys[node] = self.keys[source][index]
            return
        self.buffers[node] = self.modules.buffers()
        if node.name in self.segment.random:
            self.generators[node] = random_state()
        env[node] = self.run(node, args, kwargs, self.borders)
        self.keys[node] = keys_of(env[node])

    def run(self, node: Any, args: Any, kwargs: Any, borders: dict[Node, list[Any]] | None = None) -> Any:
        """A stage without a history, in its chunks."""
        length = self.segment.chunks.get(node.name)
        if length is None:
            args, kwargs = pytree.tree_map(unpacked, (args, kwargs))
            return node.target(*args, **kwargs)
        T, kwargs, joined = args[0][0].shape[0], dict(kwargs), None
        kept: list[Any] = []
        for start in range(0, T, length):
            kept.append(kwargs.get("state"))
            x = tuple(unpacked(steps_of(value, start, start + length)) for value in args[0])
            y = node.target(x, *args[1:], **kwargs)
            if "state" in kwargs:
                y, kwargs["state"] = y
            if joined is None:
                joined = tuple(empty_like(part, T) for part in y)
            for whole, part in zip(joined, y, strict=True):
                whole[start : start + length] = part
        if borders is not None:
            borders[node] = kept
        return (joined, kwargs["state"]) if "state" in kwargs else joined

    @contextlib.contextmanager
    def as_then(self, node: Node, parameters: Sequence[Tensor]) -> Iterator[None]:
        """What the stage met in forward."""
        modules, generators = self.modules.again(parameters, self.buffers[node]), self.generators.get(node)
        with modules, self.autocast.again(), drawing_from(generators):
            yield


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        count = len(call.tensor_positions)
        inputs, parameters = tensors[:count], tensors[count:]
        packable = call.packable(inputs)
        outputs = call.forward(inputs)
        leaves, call.result_spec = pytree.tree_flatten(outputs)
        call.results = [(isinstance(y, Tensor), None if isinstance(y, Tensor) else y) for y in leaves]
        kept: list[Tensor] = []
        ctx.packed = []
        for x, largest in zip(inputs, packable, strict=True):
            packed = pack(x, largest) if largest else None
            ctx.packed.append(packed and (packed.shape, packed.order, packed.dtype, packed.largest))
            kept.append(x if packed is None else packed.data)
        # Saved like the rest, so that it goes when the rest goes.
        states, ctx.border_spec = pytree.tree_flatten(call.borders)
        ctx.border_numbers = [_Held() if isinstance(leaf, Tensor) else leaf for leaf in states]
        call.borders = {}
        ctx.save_for_backward(*kept, *parameters, *(leaf for leaf in states if isinstance(leaf, Tensor)))
        ctx.counts = (count, count + len(parameters))
        results = tuple(y for y in leaves if isinstance(y, Tensor))
        ctx.mark_non_differentiable(*(y for y in results if not (y.is_floating_point() or y.is_complex())))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call: Call = ctx.call
        saved, (first, second) = ctx.saved_tensors, ctx.counts
        inputs: list[Any] = [
            x if packed is None else PackedTensor(x, *packed)
            for x, packed in zip(saved[:first], ctx.packed, strict=True)
        ]
        states = iter(saved[second:])
        borders = [next(states) if isinstance(n, _Held) else n for n in ctx.border_numbers]
        call.borders = pytree.tree_unflatten(borders, ctx.border_spec)
        remaining = iter(grads)
        each = [next(remaining) if is_tensor else None for is_tensor, _ in call.results]
        of_tensors, of_parameters = backward(call, inputs, saved[first:second], ctx.needs_input_grad[1:], each)
        call.borders = {}
        return None, *of_tensors, *of_parameters
