"""Running an emitted graph on meta tensors, call by call, to measure what each call takes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from snnfx.functional import multi_step_forward
from snnfx.kernels.back_ends import obstacle
from snnfx.memory.meter import CallBytes, Part, Shape, dtype_name, measure_call, meta_like
from snnfx.memory.naming import Naming
from snnfx.memory.workspace import workspace_on
from snnfx.passes.checkpoint import region_calls
from snnfx.regions import LoopRegion
from snnfx.state import named_stateful

if TYPE_CHECKING:
    from snnfx.net import Net

__all__ = ["Twin", "Walk"]


class Twin:
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


class Walk:
    """Runs an emitted graph on meta tensors for some number of steps, call by call, like calls once.

    With `naming`, who made what is noted: in `named`, of each value, and in the `CallBytes` of each call.
    """

    def __init__(
        self,
        twin: Twin,
        leaves: Sequence[Tensor],
        state: Mapping[str, Any] | None,
        training: bool,
        steps: int,
        naming: Naming | None = None,
    ) -> None:
        self.twin, self.training, self.steps, self.naming = twin, training, steps, naming
        net = twin.net
        self.graph = net._recomputation.form("main")[0] if training else net._graphs.emitted[net.training, "main"]
        self.regions = {call: name for name, call in region_calls(self.graph).items()}
        device = leaves[0].device if leaves else torch.device("cpu")
        self.has_kernels = not obstacle(device)
        self.workspace = workspace_on(device, net.options.memory_format)
        self.calls: list[_Measured] = []
        self.values: list[int] = []
        self.named: list[Part] = []
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

    def run(self) -> Walk:
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
        if self.naming is not None:
            # Every call has its own names.
            template, found = self._measure(node, leaves, spec)
        else:
            key = ((node.op, node.target), spec, tuple(_leaf_key(x) for x in leaves))
            if key not in self.known:
                self.known[key] = self._measure(node, leaves, spec)
            template, found = self.known[key]
        tensors = [self.number.get(id(x), -1) if isinstance(x, Tensor) else -1 for x in leaves]
        makes: list[int] = []
        saved = [tensors[i] for i in found.saved_inputs]
        positions = iter(range(len(found.outputs)))
        labels = self.naming.of_results(node, template) if self.naming is not None else []

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
                if labels:
                    self.named.append(Part(labels[index], tuple(y.shape), found.outputs[index], dtype_name(y.dtype)))
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
        if region is None and not any(isinstance(x, Tensor | nn.Module) for x in leaves):
            result = self._plainly(node, leaves, spec)
            if not any(isinstance(y, Tensor) for y in pytree.tree_leaves(result)):
                found = CallBytes([], [])
                found.requires_grad = False  # type: ignore[attr-defined]
                return result, found
        naming = self.naming
        if naming is not None:
            naming.enter(self.regions.get(node, node.name))
            leaves = [naming.named(x) for x in leaves]

        def run(values: Sequence[Any]) -> Any:
            result = self._plainly(node, values, spec)
            results[:] = [pytree.tree_map_only(Tensor, Shape.of, result)]
            return result

        modules = [m for x in leaves if isinstance(x, nn.Module) for m in x.modules()]
        parameters = [p for m in modules for p in (*m._parameters.values(), *m._buffers.values()) if p is not None]
        if node.target is multi_step_forward and region is not None and self.has_kernels and region.kernels is not None:
            found = self._kernel(node, run, leaves, region, results)
        else:
            found = measure_call(run, leaves, parameters, self.training, self.workspace, naming)
        needs = any(isinstance(x, Tensor) and x.requires_grad for x in (*leaves, *parameters))
        found.requires_grad = needs  # type: ignore[attr-defined]
        return results[0], found

    @staticmethod
    def _plainly(node: Node, values: Sequence[Any], spec: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(values), spec)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _kernel(self, node: Node, run: Any, leaves: list[Any], region: LoopRegion, results: list[Any]) -> CallBytes:
        """A generated kernel writes its outputs and, for backward, the cut of a step; nothing else takes memory."""
        given = [meta_like(x) if isinstance(x, Tensor) else x for x in leaves]
        with torch.no_grad():
            run(given)
        outputs = [y.tensor() for y in pytree.tree_leaves(results[0]) if isinstance(y, Shape)]
        sizes = [y.numel() * y.element_size() for y in outputs]
        sequences = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim() and x.shape[0] == self.steps]
        found = CallBytes(sizes, [-1] * len(sizes), peak=sum(sizes), peak_with_history=sum(sizes), written=sum(sizes))
        if self.naming is not None:
            labels = self.naming.of_results(node, results[0])
            found.parts = tuple(
                Part(label, tuple(y.shape), size, dtype_name(y.dtype))
                for label, y, size in zip(labels, outputs, sizes, strict=True)
            )
        if not self.training:
            return found
        count, inputs = _saved_by_kernel(region)
        largest = max(sizes, default=0)
        found.saved = count * largest
        if self.naming is not None:
            like = max(outputs, key=lambda y: y.numel() * y.element_size())
            what, shape = f"{self.naming.current}: saved by its kernel", (*[count][: count > 1], *like.shape)
            found.saved_parts = (Part(what, shape, found.saved, dtype_name(like.dtype)),)
            found.parts_with_history = (*found.parts, *found.saved_parts)
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
