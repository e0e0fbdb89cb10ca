"""The memory model: the bytes that an emitted graph holds over its execution, as a function of the steps run at once.

Every region call is run on meta tensors for two small numbers of steps (`snnfx.memory.meter`); what it takes is affine
in that number. The life of the values between the calls is read off the graph. So the peak for any number of steps, any
chunk, and any plan of what backward computes again is a sum over a table, without another run.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from snnfx.functional import multi_step_forward
from snnfx.isolation import random_state
from snnfx.memory.meter import CallBytes, Shape, measure_call, meta_like
from snnfx.memory.workspace import workspace_on
from snnfx.passes.checkpoint import region_calls
from snnfx.regions import LoopRegion
from snnfx.state import named_stateful

if TYPE_CHECKING:
    from snnfx.net import Net

__all__ = ["Affine", "CallCost", "MemoryModel", "NotPredictable", "model_memory"]


class NotPredictable(Exception):
    """The bytes of a net cannot be told from shapes; the reason is a clause."""


@dataclass(frozen=True)
class Affine:
    """`constant + per_step * k` bytes for k time steps."""

    constant: float = 0.0
    per_step: float = 0.0

    def __call__(self, steps: int) -> float:
        return max(0.0, self.constant + self.per_step * steps)


@dataclass
class CallCost:
    """One call of the emitted graph.

    Args:
        name: of its region, or of the node for what is between regions.
        is_region: whether it runs a region.
        reads: values (numbers into `MemoryModel.values`) that it is given.
        makes: values that it makes.
        saves: values that its history holds.
        dies: values that are not needed after it in forward.
        bytes: its `CallBytes`, each number as an affine function.
    """

    name: str
    is_region: bool
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    saves: tuple[int, ...]
    dies: tuple[int, ...] = ()
    bytes: dict[str, Affine] = field(default_factory=dict)


@dataclass
class MemoryModel:
    """The bytes of a net for inputs of one shape; see `model_memory`.

    Args:
        calls: in the order in which they run.
        values: bytes of each value that goes from call to call.
        outputs: the values that are returned.
        training: whether a history was looked at.
        state: bytes of the final state.
    """

    calls: list[CallCost]
    values: list[Affine]
    outputs: tuple[int, ...]
    training: bool
    state: Affine

    def inference(self, steps: int) -> tuple[float, str]:
        """The peak of running `steps` steps at once without a history, and the region that has it."""
        return max(self.inference_timeline(steps), key=lambda at: at[0], default=(0.0, ""))

    def inference_timeline(self, steps: int) -> list[tuple[float, str]]:
        """For each call, the bytes at its widest point and its name."""
        alive: dict[int, float] = {}
        points = []
        for call in self.calls:
            points.append((sum(alive.values()) + call.bytes["peak"](steps), call.name))
            alive.update((value, self.values[value](steps)) for value in call.makes)
            for value in call.dies:
                alive.pop(value, None)
        return points

    def holders(self, steps: int) -> list[tuple[str, float]]:
        """Who holds the bytes at the peak of inference: `(region, bytes)`, the largest first."""
        _, where = self.inference(steps)
        alive: dict[int, tuple[str, float]] = {}
        for call in self.calls:
            if call.name == where:
                found: dict[str, float] = {where: call.bytes["peak"](steps)}
                for name, count in alive.values():
                    found[name] = found.get(name, 0.0) + count
                return sorted(found.items(), key=lambda item: -item[1])
            alive.update((value, (call.name, self.values[value](steps))) for value in call.makes)
            for value in call.dies:
                alive.pop(value, None)
        return []


def model_memory(net: Net, leaves: Sequence[Tensor], state: Mapping[str, Any] | None, training: bool) -> MemoryModel:
    """The memory model of the current mode of a net.

    Args:
        net: in step mode "m".
        leaves: inputs with time first; only shapes and dtypes are looked at.
        state: the state before the first step, None: the reset state.
        training: whether a history is kept.

    Raises:
        NotPredictable: the net looks at values, or does what meta tensors do not do.
    """
    twin = _Twin(net)
    generators = random_state()
    try:
        # The few tensors of a single step of a Python loop must not be what is widest: it takes more steps to see that.
        few = 8 if any(isinstance(m, LoopRegion) and m.kernels is None for m in net.modules()) else 2
        runs = [_Walk(twin, leaves, state, training, steps).run() for steps in (few, few + 1)]
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise NotPredictable(str(error).splitlines()[0]) from error
    finally:
        if random_state() != generators:
            torch.set_rng_state(torch.tensor(list(generators[0]), dtype=torch.uint8))
    return _combined(runs[0], runs[1], training)


class _Twin:
    """The modules of a net without data, in the same modes."""

    def __init__(self, net: Net) -> None:
        self.net = net
        memo: dict[int, Any] = {}
        for tensor in [*net.source.parameters(), *net.source.buffers(), *net._modules["snnfx_constants"].buffers()]:  # type: ignore[union-attr]
            meta = meta_like(tensor)
            memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
        for _, module, adapter in named_stateful(net.source):
            memo.update((id(value), meta_like(value)) for value in adapter.read(module) if isinstance(value, Tensor))
        roots = (net.source, net._modules["snnfx_constants"])
        copies: Any = copy.deepcopy(roots, memo)
        self.source, self.constants = copies
        for module in (*self.source.modules(), *self.constants.modules()):
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                module.__dict__[hooks].clear()
            for name, value in module.__dict__.items():
                if isinstance(value, Tensor):
                    module.__dict__[name] = meta_like(value)

    def resolve(self, target: str) -> Any:
        if target.startswith("snnfx_regions."):
            found: Any = self.net
            for atom in target.split("."):
                found = found._modules[atom]
            return found
        atoms = target.split(".")
        if atoms[0] == "snnfx_constants":
            found, atoms = self.constants, atoms[1:]
        elif atoms[0] == "snnfx_source":
            found, atoms = self.source, atoms[1:]
        else:
            found = self.source
        for atom in atoms:
            found = getattr(found, atom)
        return found


@dataclass
class _Measured:
    """One call, for one number of steps."""

    name: str
    is_region: bool
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    bytes: CallBytes
    saves: tuple[int, ...]


class _Walk:
    """Runs an emitted graph on meta tensors for some number of steps, call by call, like calls once."""

    def __init__(
        self, twin: _Twin, leaves: Sequence[Tensor], state: Mapping[str, Any] | None, training: bool, steps: int
    ) -> None:
        self.twin, self.training, self.steps = twin, training, steps
        net = twin.net
        self.graph = net._recomputation.form("main")[0] if training else net._emitted[net.training, "main"]
        self.regions = {call: name for name, call in region_calls(self.graph).items()}
        device = leaves[0].device if leaves else torch.device("cpu")
        self.on_cpu = device.type == "cpu"
        self.workspace = workspace_on(device, net.options.memory_format)
        self.calls: list[_Measured] = []
        self.values: list[int] = []
        self.number: dict[int, int] = {}
        self.known: dict[Any, tuple[Any, CallBytes]] = {}
        self.alive: list[Any] = []
        varying = net._arguments.varying
        self.given: list[Any] = [
            self._input(x, torch.empty((steps, *x.shape[1:]), dtype=x.dtype, device="meta") if v else meta_like(x))
            for x, v in zip(leaves, varying, strict=True)
        ]
        self.given.append(
            pytree.tree_map_only(Tensor, lambda s: self._input(s, meta_like(s)), dict(state)) if state else None
        )
        self.given.append(torch.empty(steps, dtype=torch.int64, device="meta"))

    def _input(self, original: Tensor, value: Tensor) -> Tensor:
        """A value of the caller's: it is not counted."""
        value.requires_grad_(self.training and original.requires_grad)
        self.alive.append(value)
        self.number[id(value)] = -1
        return value

    def run(self) -> _Walk:
        env: dict[Node, Any] = {}
        given = iter(self.given)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = self.twin.resolve(str(node.target))
            elif node.op == "output":
                self.result = map_arg(node.args[0], env.__getitem__)
            elif node.target is operator.getitem and not isinstance(env[node.args[0]], Tensor):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self._call(node, *map_arg((node.args, node.kwargs), env.__getitem__))
        return self

    def numbers(self, tree: Any) -> tuple[int, ...]:
        """The values among the leaves of a tree, without those of the caller's."""
        found = [self.number.get(id(x), -1) for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
        return tuple(dict.fromkeys(n for n in found if n >= 0))

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = (_target_key(node), spec, tuple(_leaf_key(x) for x in leaves))
        if key not in self.known:
            self.known[key] = self._measure(node, leaves, spec)
        template, found = self.known[key]
        tensors = [self.number.get(id(x), -1) if isinstance(x, Tensor) else -1 for x in leaves]
        makes: list[int] = []
        saved = [tensors[i] for i in found.saved_inputs]
        positions = iter(range(len(found.outputs)))

        def fresh(y: Shape) -> Tensor:
            value, index = y.tensor(), next(positions)
            grown = self.training and y.dtype.is_floating_point and found.requires_grad  # type: ignore[attr-defined]
            value.requires_grad_(grown)
            self.alive.append(value)
            if found.aliases[index] >= 0:
                self.number[id(value)] = tensors[found.aliases[index]]
            else:
                self.number[id(value)] = len(self.values)
                makes.append(len(self.values))
                self.values.append(found.outputs[index])
                if index in found.saved_outputs:
                    saved.append(self.number[id(value)])
            return value

        result = pytree.tree_map_only(Shape, fresh, template)
        name = self.regions.get(node, node.name)
        reads = tuple(dict.fromkeys(t for t in tensors if t >= 0))
        held = tuple(dict.fromkeys(s for s in saved if s >= 0))
        self.calls.append(_Measured(name, node in self.regions, reads, tuple(makes), found, held))
        return result

    def _measure(self, node: Node, leaves: list[Any], spec: Any) -> tuple[Any, CallBytes]:
        region = next((x for x in leaves if isinstance(x, LoopRegion)), None)
        results: list[Any] = []

        def run(values: Sequence[Any]) -> Any:
            args, kwargs = pytree.tree_unflatten(list(values), spec)
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)  # type: ignore[operator]
            results[:] = [pytree.tree_map_only(Tensor, Shape.of, result)]
            return result

        modules = [m for x in leaves if isinstance(x, nn.Module) for m in x.modules()]
        parameters = [p for m in modules for p in (*m._parameters.values(), *m._buffers.values()) if p is not None]
        if node.target is multi_step_forward and region is not None and self.on_cpu and region.kernels is not None:
            found = self._kernel(run, leaves, region, results)
        else:
            found = measure_call(run, leaves, parameters, self.training, self.workspace)
        needs = any(isinstance(x, Tensor) and x.requires_grad for x in (*leaves, *parameters))
        found.requires_grad = needs  # type: ignore[attr-defined]
        return results[0], found

    def _kernel(self, run: Any, leaves: list[Any], region: LoopRegion, results: list[Any]) -> CallBytes:
        """A generated kernel writes its outputs and, for backward, the cut of a step; nothing else takes memory."""
        given = [meta_like(x) if isinstance(x, Tensor) else x for x in leaves]
        with torch.no_grad():
            run(given)
        outputs = [y.tensor() for y in pytree.tree_leaves(results[0]) if isinstance(y, Shape)]
        sizes = [y.numel() * y.element_size() for y in outputs]
        sequences = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and x.shape[0] == self.steps]
        found = CallBytes(sizes, [-1] * len(sizes), peak=sum(sizes), peak_with_history=sum(sizes), written=sum(sizes))
        if not self.training:
            return found
        count, inputs = _saved_by_kernel(region)
        largest = max(sizes, default=0)
        found.saved = count * largest
        found.saved_inputs = tuple(sequences[i] for i in inputs if i < len(sequences))
        found.peak_with_history += found.saved
        found.grads = sum(leaves[i].numel() * leaves[i].element_size() for i in sequences if leaves[i].requires_grad)
        found.backward = found.backward_held = found.grads + sum(sizes)
        return found


def _saved_by_kernel(region: LoopRegion) -> tuple[int, tuple[int, ...]]:
    """Sequences that its kernel saves, and inputs that it keeps; before the first call: one, as for most neurons."""
    assert region.kernels is not None
    for entry in region.kernels.entries.values():
        for needs in entry.built:
            if needs is not None and entry.lowered is not None:
                plan = entry.lowered.training(needs).plan
                return len(plan.saved), tuple(plan.inputs)
    return 1, ()


def _target_key(node: Node) -> Any:
    return (node.op, node.target)


def _leaf_key(value: Any) -> Any:
    """Two calls with equal keys take the same memory."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), tuple(value.stride()), value.dtype, value.requires_grad)
    if isinstance(value, nn.Module):
        graphs = [m.graph for m in value.modules() if hasattr(m, "graph")]
        if graphs:
            return (type(value), *(_graph_key(graph) for graph in graphs), getattr(value, "kernels", None) is None)
        return (repr(value), value.training, *(_leaf_key(p) for m in value.modules() for p in m._parameters.values()))
    return value if isinstance(value, int | float | bool | str | None) else repr(value)


def _graph_key(graph: Any) -> Any:
    key = graph.__dict__.get("_snnfx_key")
    if key is None:
        order = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
        key = tuple(
            (
                n.op,
                "" if n.op == "placeholder" else str(n.target),
                str(map_arg((n.args, n.kwargs), lambda m: _Name(order[m]))),
            )
            for n in graph.nodes
        )
        graph.__dict__["_snnfx_key"] = key
    return key


class _Name(str):
    __slots__ = ()


def _combined(two: _Walk, three: _Walk, training: bool) -> MemoryModel:
    """The table for any number of steps, from those for two and for three."""

    def affine(a: float, b: float) -> Affine:
        return Affine(a - two.steps * (b - a), b - a)

    if len(two.calls) != len(three.calls) or len(two.values) != len(three.values):
        raise NotPredictable("it does something else for another number of time steps")
    fields = (
        "peak",
        "peak_with_history",
        "saved",
        "backward",
        "backward_held",
        "grads",
        "of_parameters",
        "written",
        "operations",
    )
    calls = [
        CallCost(
            a.name,
            a.is_region,
            a.reads,
            a.makes,
            a.saves,
            bytes={f: affine(getattr(a.bytes, f), getattr(b.bytes, f)) for f in fields},
        )
        for a, b in zip(two.calls, three.calls, strict=True)
    ]
    outputs, state = two.result[0], two.result[1]
    returned = two.numbers(outputs)
    in_state = two.numbers(state)
    last: dict[int, int] = {}
    for index, call in enumerate(calls):
        last.update(dict.fromkeys((*call.reads, *call.makes), index))
    for value, index in last.items():
        if value not in returned and value not in in_state:
            calls[index].dies += (value,)
    values = [affine(a, b) for a, b in zip(two.values, three.values, strict=True)]
    total = [values[v] for v in in_state]
    return MemoryModel(
        calls,
        values,
        returned,
        training,
        Affine(sum(v.constant for v in total), sum(v.per_step for v in total)),
    )
