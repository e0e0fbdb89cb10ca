"""Run an emitted graph on meta tensors, call by call, and measure the memory of each call."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg

from snnfx.emit.emitted_graphs import CONSTANTS, REGIONS
from snnfx.emit.executable import Executable
from snnfx.emit.recompute_segments import region_calls
from snnfx.emit.tiling import STATISTICS
from snnfx.ir.facts import IS_PRODUCT, STEP_NODE, VALUE
from snnfx.ir.program import SELF_TARGET
from snnfx.lowering.choices.image_formats import fastest_format
from snnfx.lowering.elementwise.back_end_choice import reason_without_back_end
from snnfx.memory.kernel_stand_in import KernelStandIn
from snnfx.memory.meter import CallBytes, Count, NamedBytes, Shape, dtype_name, measure_call
from snnfx.memory.tensor_names import Naming
from snnfx.memory.workspace import Workspace
from snnfx.ops.memory_format import image_format
from snnfx.recompute.batch_statistics import step_statistics
from snnfx.regions.region_modules import LoopRegion
from snnfx.regions.sequence_region import RegionGraph
from snnfx.sandbox.internal_faults import first_line
from snnfx.sandbox.tensor_values import meta_like
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import named_stateful

__all__ = ["MetaCopy", "MetaRun", "NotPredictable"]


class NotPredictable(Exception):
    """Memory use cannot be predicted from shapes; the message is the reason, a clause."""


class MetaCopy:
    """A copy of the modules of a net on meta tensors, in the same modes."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.steps: dict[Any, Any] = {}
        self.keys: dict[int, Any] = {}
        memo: dict[int, Any] = {}
        source, constants = executable.source, executable.constants
        for tensor in [*source.parameters(), *source.buffers(), *constants.buffers()]:
            meta = meta_like(tensor)
            memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
        for _, module, adapter in named_stateful(source):
            memo.update((id(value), meta_like(value)) for value in adapter.read(module) if isinstance(value, Tensor))
        try:
            copies: Any = copy.deepcopy((source, constants), memo)
        except Exception as error:  # the modules of the user may refuse a copy in any way
            raise NotPredictable(f"a module cannot be copied ({first_line(error)})") from error
        self.source, self.constants = copies
        for module in (*self.source.modules(), *self.constants.modules()):
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                module.__dict__[hooks].clear()
            for name, value in module.__dict__.items():
                # Scalar tensors keep their values: some cells store sizes and thresholds in them.
                if isinstance(value, Tensor) and value.dim() > 0:
                    module.__dict__[name] = meta_like(value)

    def has_kernels(self, leaves: Sequence[Tensor]) -> bool:
        """Whether loops may run as generated kernels on the device of the inputs."""
        return not reason_without_back_end(leaves[0].device if leaves else torch.device("cpu"))

    def marker(self, leaves: Sequence[Tensor]) -> int:
        """A number of steps that identifies the time dimension: a prime of at least T that divides no other size."""
        modules = (*self.source.modules(), *self.constants.modules())
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        tensors += [v for node in self.executable.program.graph.nodes if isinstance(v := VALUE.of(node), Tensor)]
        sizes = {n for t in tensors for n in t.shape}
        sizes |= {n for x, v in zip(leaves, self.executable.varying_inputs, strict=True) for n in x.shape[v:]}
        T = max((x.shape[0] for x, v in zip(leaves, self.executable.varying_inputs, strict=True) if v), default=1)
        number = max(T, 101) | 1
        while not all(number % d for d in range(3, int(number**0.5) + 1, 2)) or any(
            n % number == 0 for n in sizes if n
        ):
            number += 2
        return number

    def resolve(self, target: str) -> Any:
        if target.startswith(f"{REGIONS}."):
            found: Any = self.executable.root
            for atom in target.split("."):
                found = found._modules[atom]
            return found
        atoms = target.split(".")
        if atoms[0] == CONSTANTS:
            found, atoms = self.constants, atoms[1:]
        elif atoms[0] == SELF_TARGET:
            found, atoms = self.source, atoms[1:]
        else:
            found = self.source
        for atom in atoms:
            found = getattr(found, atom)
        return found


@dataclass
class _MeasuredCall:
    """One call of the graph for one number of time steps."""

    name: str
    is_region: bool
    role: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    bytes: CallBytes
    saves: tuple[int, ...]


class MetaRun:
    """Runs an emitted graph on meta tensors for one number of time steps and measures each call.

    Equal calls are measured once. `naming` records the names of tensors, in `named` for values and in the `CallBytes`
    of each call. With `marker`, the number of steps is a prime that separates sizes that grow with the steps (see
    `snnfx.memory.meter.Meter`). `part` is "main", or "first" for a separate first step.
    """

    def __init__(
        self,
        meta_copy: MetaCopy,
        leaves: Sequence[Tensor],
        state: Mapping[str, Any] | None,
        training: bool,
        steps: int,
        naming: Naming | None = None,
        in_tiles: bool = False,
        marker: bool = False,
        part: str = "main",
    ) -> None:
        self.meta_copy, self.training, self.steps, self.naming = meta_copy, training, steps, naming
        self.marker = steps if marker else None
        executable = meta_copy.executable
        if in_tiles:
            self.graph = executable.recompute_form("main").graph
        else:
            self.graph = executable.graphs.emitted[executable.training, part]
        self.regions = {call: name for name, call in region_calls(self.graph).items()}
        device = leaves[0].device if leaves else torch.device("cpu")
        self.has_kernels = meta_copy.has_kernels(leaves)
        longest = max((x.shape[0] for x, v in zip(leaves, executable.varying_inputs, strict=True) if v), default=steps)
        self.workspace = Workspace(device, longest / steps)
        self.calls: list[_MeasuredCall] = []
        self.values: list[Count] = []
        self.step_of: dict[int, str] = {}
        self.named: list[NamedBytes] = []
        self.number: dict[int, int] = {}
        self.measured: dict[Any, tuple[Any, CallBytes]] = {}
        self.alive: list[Any] = []
        varying = executable.varying_inputs
        over_time = () if part == "first" else (steps,)
        self.given: list[Any] = [
            self._input(x, torch.empty((*over_time, *x.shape[1:]), dtype=x.dtype, device="meta") if v else meta_like(x))
            for x, v in zip(leaves, varying, strict=True)
        ]
        self.given.append(
            pytree.tree_map_only(Tensor, lambda s: self._input(s, meta_like(s)), dict(state)) if state else None
        )
        self.given.append(torch.empty(steps, dtype=torch.int64, device="meta"))

    def _input(self, original: Tensor, value: Tensor) -> Tensor:
        """Register an input: the memory of the caller does not count."""
        value.requires_grad_(self.training and original.requires_grad)
        self.alive.append(value)
        self.number[id(value)] = -1
        return value

    def run(self) -> MetaRun:
        env: dict[Node, Any] = {}
        given = iter(self.given)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = self.meta_copy.resolve(str(node.target))
            elif node.op == "output":
                self.result = map_arg(node.args[0], env.__getitem__)
            elif node.target is operator.getitem and not isinstance(env[node.args[0]], Tensor):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self._call(node, *map_arg((node.args, node.kwargs), env.__getitem__))
            if STEP_NODE.is_known(node) and isinstance(env[node], Tensor):
                self.step_of.setdefault(self.number.get(id(env[node]), -1), STEP_NODE.of(node))
        return self

    def numbers(self, tree: Any) -> tuple[int, ...]:
        """The numbers of the values among the leaves of a tree, without the inputs."""
        numbers = [self.number.get(id(x), -1) for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
        return tuple(dict.fromkeys(n for n in numbers if n >= 0))

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.naming is not None:
            # Names differ between equal calls.
            template, measured = self._measure(node, leaves, spec)
        else:
            key = ((node.op, node.target), spec, tuple(self._leaf_key(x) for x in leaves))
            if key not in self.measured:
                self.measured[key] = self._measure(node, leaves, spec)
            template, measured = self.measured[key]
        tensors = [self.number.get(id(x), -1) if isinstance(x, Tensor) else -1 for x in leaves]
        makes: list[int] = []
        saved = [tensors[i] for i in measured.saved_inputs]
        positions = iter(range(len(measured.outputs)))
        labels = self.naming.of_results(node, template) if self.naming is not None else []

        def fresh(y: Shape) -> Tensor:
            value, index = y.tensor(), next(positions)
            is_differentiable = y.dtype.is_floating_point and measured.requires_grad  # type: ignore[attr-defined]
            value.requires_grad_(self.training and is_differentiable)
            self.alive.append(value)
            if measured.aliases[index] >= 0:
                self.number[id(value)] = tensors[measured.aliases[index]]
            else:
                self.number[id(value)] = len(self.values)
                makes.append(len(self.values))
                self.values.append(measured.outputs[index])
                if labels:
                    self.named.append(
                        NamedBytes(labels[index], tuple(y.shape), measured.outputs[index].total, dtype_name(y.dtype))
                    )
                if index in measured.saved_outputs:
                    saved.append(self.number[id(value)])
            return value

        result = pytree.tree_map_only(Shape, fresh, template)
        name = self.regions.get(node, node.name)
        reads = tuple(dict.fromkeys(t for t in tensors if t >= 0))
        saves = tuple(dict.fromkeys(s for s in saved if s >= 0))
        role = "product" if IS_PRODUCT.of(node) else "statistics" if node.target in STATISTICS else ""
        self.calls.append(_MeasuredCall(name, node in self.regions, role, reads, tuple(makes), measured, saves))
        return result

    def _leaf_key(self, value: Any) -> Any:
        """A cache key: calls with equal keys take the same memory."""
        if not isinstance(value, nn.Module):
            return _leaf_key(value)
        key = self.meta_copy.keys.get(id(value))
        if key is None:
            key = self.meta_copy.keys[id(value)] = _leaf_key(value)
        return key

    def _measure(self, node: Node, leaves: list[Any], spec: Any) -> tuple[Any, CallBytes]:
        results: list[Any] = []
        if not any(isinstance(x, Tensor | nn.Module) for x in leaves):
            result = self._run_node(node, leaves, spec)
            if not any(isinstance(y, Tensor) for y in pytree.tree_leaves(result)):
                nothing = CallBytes([], [])
                nothing.requires_grad = False  # type: ignore[attr-defined]
                return result, nothing
        if node.target in STATISTICS:
            return self._statistics(leaves, node.target is step_statistics)
        naming = self.naming
        if naming is not None:
            naming.enter(self.regions.get(node, node.name))
        modules = [m for x in leaves if isinstance(x, nn.Module) for m in x.modules()]
        parameters = [p for m in modules for p in (*m._parameters.values(), *m._buffers.values()) if p is not None]
        requires_grad = any(isinstance(x, Tensor) and x.requires_grad for x in (*leaves, *parameters))
        graphs = [x.graph for x in leaves if isinstance(x, RegionGraph)]
        self.workspace.reformats = any(
            n.target in (fastest_format, image_format) for graph in graphs for n in graph.nodes
        )
        leaves = [self._stand_in(x) for x in leaves]

        def run(values: Sequence[Any]) -> Any:
            result = self._run_node(node, values, spec)
            results[:] = [pytree.tree_map_only(Tensor, Shape.of, result)]
            return result

        measured = measure_call(run, leaves, parameters, self.training, self.workspace, naming, self.marker)
        measured.requires_grad = requires_grad  # type: ignore[attr-defined]
        return results[0], measured

    def _statistics(self, leaves: list[Any], per_step: bool) -> tuple[Any, CallBytes]:
        """Batch statistics are a few numbers; their backward pass adds to the gradient of the sequence."""
        x = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        dtype = torch.promote_types(x.dtype, torch.float32)
        sizes = (self.steps, x.shape[2]) if per_step else (x.shape[2],)
        value = torch.empty(sizes, dtype=dtype, device="meta")
        number, gradient = value.numel() * value.element_size(), x.numel() * x.element_size()
        each = Count(0, number) if per_step and self.marker else Count(number)
        measured = CallBytes([each, each], [-1, -1], peak=each + each, peak_with_history=each + each)
        if x.requires_grad:
            measured.grads = Count(0, gradient) if self.marker else Count(gradient)
        measured.requires_grad = x.requires_grad  # type: ignore[attr-defined]
        return (Shape.of(value), Shape.of(value)), measured

    def _stand_in(self, value: Any) -> Any:
        """The substitute for a module: a loop with a kernel becomes a `KernelStandIn`, a graph tracks names."""
        if isinstance(value, LoopRegion) and self.has_kernels and value.kernels is not None:
            name = value.label.partition(" ")[0]
            if self.naming is None:
                return KernelStandIn(value, self.meta_copy.steps)
            return KernelStandIn(
                value, self.meta_copy.steps, self.naming, self.naming.of_region(name), self.naming.slots.get(name, ())
            )
        return self.naming.named(value) if self.naming is not None else value

    @staticmethod
    def _run_node(node: Node, values: Sequence[Any], spec: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(values), spec)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _leaf_key(value: Any) -> Any:
    """A cache key: calls with equal keys take the same memory."""
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
