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
from torch.autograd.graph import get_gradient_edge
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from snnfx.memory.packing import PackedTensor, empty_steps, memory_order, pack, unpack
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
    parameters = _parameters_of(modules)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not any(t.requires_grad for t in (*tensors, *parameters)) or any(map(has_forward_hooks, modules)):
        return segment.plainly(values)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    statics = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    call = _Call(segment, statics, spec, positions, _Modules(modules, parameters))
    found = iter(_Recompute.apply(call, *tensors, *parameters))
    return pytree.tree_unflatten(  # type: ignore[no-any-return]
        [next(found) if is_tensor else value for is_tensor, value in call.results], call.result_spec
    )


def _parameters_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    return list({id(p): p for m in modules for p in m._parameters.values() if p is not None}.values())


@dataclass
class _Modules:
    """The modules of a segment as they were in forward."""

    modules: list[nn.Module]
    parameters: list[Tensor]

    def __post_init__(self) -> None:
        number = {id(p): i for i, p in enumerate(self.parameters)}
        # A recurrent layer of torch.nn reads its parameters past its registry: they are used as they are.
        self.places = [
            (m._parameters, key, number[id(p)])
            for m in self.modules
            if not isinstance(m, nn.RNNBase)
            for key, p in m._parameters.items()
            if p is not None
        ]
        self.training = [m.training for m in self.modules]

    def buffers(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Copies of what a run may change: the buffers of modules in training, with their places."""
        changing = [m for m in self.modules if m.training]
        return [(m._buffers, key, b.clone()) for m in changing for key, b in m._buffers.items() if b is not None]

    @contextlib.contextmanager
    def again(
        self, parameters: Sequence[Tensor], buffers: Sequence[tuple[dict[str, Any], str, Tensor]]
    ) -> Iterator[None]:
        """Modules in their mode of then, with these parameters and with copies of these buffers."""
        undo: list[tuple[dict[str, Any], str, Any]] = []
        registry: dict[str, Any]
        modes = [(m, m.training) for m in self.modules]
        try:
            for registry, key, index in self.places:
                undo.append((registry, key, registry[key]))
                registry[key] = parameters[index]  # type: ignore[assignment]
            for registry, key, value in buffers:
                undo.append((registry, key, registry[key]))
                registry[key] = value.clone()
            for module, training in zip(self.modules, self.training, strict=True):
                module.training = training
            yield
        finally:
            for registry, key, own in reversed(undo):
                registry[key] = own
            for module, training in modes:
                module.training = training


class _Key:
    """Stands for one tensor that goes into or comes out of a stage."""


class _Held:
    """Stands for a tensor that autograd holds."""


@dataclass
class _Call:
    """One run of a segment, and what its backward pass needs to know."""

    segment: Segment
    statics: list[Any]
    spec: pytree.TreeSpec
    tensor_positions: list[int]
    modules: _Modules
    results: list[tuple[bool, Any]] = field(default_factory=list)
    result_spec: Any = None
    keys: dict[Node, Any] = field(default_factory=dict)
    buffers: dict[Node, list[Any]] = field(default_factory=dict)
    generators: dict[Node, Any] = field(default_factory=dict)
    borders: dict[Node, list[Any]] = field(default_factory=dict)
    autocast: Any = None

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
            self.keys[node] = _keys_of(env[node])
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
            self.generators[node] = _generator_states()
        env[node] = self._run(node, args, kwargs, self.borders)
        self.keys[node] = _keys_of(env[node])

    def _run(self, node: Any, args: Any, kwargs: Any, borders: dict[Node, list[Any]] | None = None) -> Any:
        """A stage without a history, in its chunks."""
        length = self.segment.chunks.get(node.name)
        if length is None:
            args, kwargs = pytree.tree_map(_unpacked, (args, kwargs))
            return node.target(*args, **kwargs)
        T, kwargs, joined = args[0][0].shape[0], dict(kwargs), None
        kept: list[Any] = []
        for start in range(0, T, length):
            kept.append(kwargs.get("state"))
            x = tuple(_unpacked(_steps(value, start, start + length)) for value in args[0])
            y = node.target(x, *args[1:], **kwargs)
            if "state" in kwargs:
                y, kwargs["state"] = y
            if joined is None:
                joined = tuple(_empty_like(part, T) for part in y)
            for whole, part in zip(joined, y, strict=True):
                whole[start : start + length] = part
        if borders is not None:
            borders[node] = kept
        return (joined, kwargs["state"]) if "state" in kwargs else joined

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(
        self,
        tensors: Sequence[Any],
        parameters: Sequence[Tensor],
        needs: Sequence[bool],
        grads: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of the tensors and of the parameters."""
        segment = self.segment
        env: dict[Node, Any] = dict(zip(segment.placeholders, self.values(tensors), strict=True))
        outside = pytree.tree_leaves([self.keys[node] for node in segment.placeholders])
        keys_of_tensors = [outside[position] for position in self.tensor_positions]
        frozen = {key for key, need in zip(keys_of_tensors, needs, strict=False) if not need}
        found: dict[Any, Tensor] = {}
        output = segment.graph.output_node()
        for key, grad in zip(pytree.tree_leaves(self.keys[output]), grads, strict=True):
            if grad is not None:
                _add(found, key, grad)
        own = [p.detach().requires_grad_(n) for p, n in zip(parameters, needs[len(tensors) :], strict=True)]
        pass_on = _Pass(found, frozen, own, [None] * len(own))
        for node in segment.graph.nodes:
            # What the later stages read is computed once more, without a history.
            if node.target is operator.getitem and node.args[0] in env:
                env[node] = env[node.args[0]][node.args[1]]
            elif node in segment.stages[:-1]:
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                with torch.no_grad(), self._as_then(node, own):
                    env[node] = self._run(node, args, kwargs)
        for node in reversed(segment.stages):
            env.pop(node, None)
            for user in node.users:
                env.pop(user, None)
            self._backward_node(node, env, pass_on)
        return [found.get(key) for key in keys_of_tensors], pass_on.of_parameters

    def _backward_node(self, node: Node, env: dict[Node, Any], state: _Pass) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        keys = map_arg((node.args, node.kwargs), self.keys.__getitem__)
        given = [
            state.found.pop(key, None) if isinstance(key, _Key) else None for key in pytree.tree_leaves(self.keys[node])
        ]
        if all(g is None for g in given):
            return
        length = self.segment.chunks.get(node.name)
        if length is None:
            self._vjp(node, args, kwargs, keys, given, state)
        else:
            self._vjp_in_chunks(node, length, args, dict(kwargs), keys, given, state)

    def _vjp(self, node: Any, args: Any, kwargs: Any, keys: Any, given: list[Tensor | None], state: _Pass) -> None:
        """The vector-Jacobian product of one run of a stage; gradients are added up in `state`."""
        values, spec = pytree.tree_flatten((args, kwargs))
        inputs: dict[Any, Tensor] = {}
        entered: dict[Any, Tensor] = {}
        with torch.enable_grad(), self._as_then(node, state.parameters):
            for i, (value, key) in enumerate(zip(values, pytree.tree_leaves(keys), strict=True)):
                if isinstance(value, Tensor | PackedTensor) and isinstance(key, _Key):
                    if key not in entered:
                        x = _unpacked(value).detach()
                        if key not in state.frozen and (x.is_floating_point() or x.is_complex()):
                            inputs[key] = x.new_empty(()).expand(x.shape).requires_grad_()
                            x = _Enter.apply(inputs[key], [x])
                        entered[key] = x
                        del x
                    values[i] = entered[key]
            args, kwargs = pytree.tree_unflatten(values, spec)
            outputs = pytree.tree_leaves(node.target(*args, **kwargs))
            del values, args, kwargs, entered
        pairs = [
            (get_gradient_edge(y), g) for y, g in zip(outputs, given, strict=True) if g is not None and y.requires_grad
        ]
        del outputs
        parameters = [(i, p) for i, p in enumerate(state.parameters) if p.requires_grad]
        if not pairs or not (inputs or parameters):
            return
        ends = [*inputs.values(), *(p for _, p in parameters)]
        grads = torch.autograd.grad([e for e, _ in pairs], ends, [g for _, g in pairs], allow_unused=True)
        for key, grad in zip(inputs, grads, strict=False):
            if grad is not None:
                _add(state.found, key, grad)
        for (i, _), grad in zip(parameters, grads[len(inputs) :], strict=True):
            if grad is not None:
                before = state.of_parameters[i]
                state.of_parameters[i] = grad if before is None else before + grad

    def _vjp_in_chunks(
        self,
        node: Node,
        length: int,
        args: Any,
        kwargs: dict[str, Any],
        keys: Any,
        given: list[Tensor | None],
        state: _Pass,
    ) -> None:
        """The same in chunks of time steps, from the last one to the first."""
        (key_args, key_kwargs), carries = keys, "state" in kwargs
        outputs = len(self.keys[node][0]) if carries else len(self.keys[node])
        of_outputs, of_state = given[:outputs], given[outputs:]
        T = args[0][0].shape[0]
        totals: dict[Any, Tensor] = {}
        starts = range(0, T, length)
        for number, start in reversed(list(enumerate(starts))):
            x = tuple(_steps(value, start, start + length) for value in args[0])
            before = self.borders[node][number] if carries else None
            # The state at an inner border is a value of its own; the first one came from outside.
            before_keys = key_kwargs.get("state") if number == 0 else _keys_of(before)
            now = {**kwargs, "state": before} if carries else kwargs
            now_keys = (key_args, {**key_kwargs, "state": before_keys} if carries else key_kwargs)
            after = [g[start : start + length] if g is not None else None for g in of_outputs]
            part = _Pass({}, state.frozen, state.parameters, state.of_parameters)
            self._vjp(node, (x, *args[1:]), now, now_keys, [*after, *of_state], part)
            for key in key_args[0]:
                grad = part.found.pop(key, None)
                if grad is not None and key not in totals:
                    totals[key] = _empty_like(grad, T)
                    totals[key][start + length :] = 0.0  # later chunks gave none
                if key in totals:
                    totals[key][start : start + length] = 0.0 if grad is None else grad
            if number == 0:
                carries = False  # the gradient of the first state goes outside
            of_state = [part.found.pop(key, None) for key in pytree.tree_leaves(before_keys)] if carries else []
            for key, grad in part.found.items():
                _add(state.found, key, grad)
        for key, grad in totals.items():
            _add(state.found, key, grad)

    @contextlib.contextmanager
    def _as_then(self, node: Node, parameters: Sequence[Tensor]) -> Iterator[None]:
        """What the stage met in forward."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.modules.again(parameters, self.buffers[node]))
            for device, dtype, enabled, cache in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            if node in self.generators:
                now = _generator_states()
                stack.callback(_set_generators, now)
                _set_generators(self.generators[node])
            yield


@dataclass
class _Pass:
    """What a backward pass through a segment gathers."""

    found: dict[Any, Tensor]
    frozen: set[Any]
    parameters: list[Tensor]
    of_parameters: list[Tensor | None]


class _Enter(torch.autograd.Function):
    """Where a value enters a run in backward. Its gradient is that of a token of its shape and of no size, so that
    nobody holds the value itself once it has been used."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, value: list[Tensor]) -> Tensor:
        return value.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        count = len(call.tensor_positions)
        inputs, parameters = tensors[:count], tensors[count:]
        packable = call.packable(inputs)
        call.autocast = _autocast_states()
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
        call: _Call = ctx.call
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
        of_tensors, of_parameters = call.backward(inputs, saved[first:second], ctx.needs_input_grad[1:], each)
        call.borders = {}
        return None, *of_tensors, *of_parameters


def _empty_like(x_seq: Tensor, T: int) -> Tensor:
    """T steps in the memory format of these."""
    return empty_steps((T, *x_seq.shape[1:]), memory_order(x_seq), x_seq.dtype, x_seq.device)


def _keys_of(value: Any) -> Any:
    return pytree.tree_map(lambda _: _Key(), value)


def _unpacked(value: Any) -> Any:
    return unpack(value) if isinstance(value, PackedTensor) else value


def _steps(value: Any, start: int, stop: int) -> Any:
    return value.steps(start, stop) if isinstance(value, PackedTensor) else value[start:stop]


def _add(found: dict[Any, Tensor], key: Any, grad: Tensor) -> None:
    found[key] = found[key] + grad if key in found else grad


def _generator_states() -> tuple[Tensor, list[Tensor]]:
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_devices


def _set_generators(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


def _autocast_states() -> list[tuple[str, torch.dtype, bool, bool]]:
    cache = torch.is_autocast_cache_enabled()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), cache) for d in devices]
