"""`snnfx.from_nir`: a single-step model from a NIR graph."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import networkx
import numpy as np
import torch
from torch import Tensor, nn

from snnfx.deploy.nir_cells import Delay
from snnfx.deploy.nir_file import DELAYED_EDGES, TIME_STEP, require_nir
from snnfx.deploy.nir_modules import dtype_of, graph_refusal, module_of
from snnfx.errors import InputError
from snnfx.memory_module import MemoryModule
from snnfx.state.registry import adapter_of

__all__ = ["NIRModel", "from_nir"]

Edge = tuple[str, str]


def from_nir(
    path_or_graph: str | os.PathLike[str] | Any,
    dt: float | None = None,
    *,
    device: torch.device | str | None = None,
) -> NIRModel:
    """Make a single-step model from a NIR graph (neuroir.org).

    Layers become layers of torch.nn, and neurons those of snnfx.neuron where they have the parameters, discretised with
    forward Euler. A node adds up its incoming edges. An edge of a cycle carries the value of the previous step: the one
    from the neuron of the cycle, or the edges that snnfx recorded in the file. Nested graphs are inlined. Spiking
    neurons start at v_reset, integrators at v_leak.

    Args:
        path_or_graph: a `.nir` file, or a `nir.NIRGraph`.
        dt: the time step in seconds. Default: None, the time step in the file if snnfx wrote it, else 1e-4.
        device: the device of the weights. Default: None, the CPU.

    Returns:
        A model that computes one time step: tensors `[N, *]` in the order of the graph's inputs -> a tensor `[N, *]`,
        or a tuple in the order of its outputs. `[*]` is the shape in the graph. Its dtype is that of the weights, and
        float32 where they differ. `snnfx.convert` makes it a multi-step net.

    Raises:
        InputError: SNNFX816, the graph cannot be imported; SNNFX817, the file cannot be read.
        ExportError: SNNFX803, nir is not installed.

    Example:
        >>> import numpy as np, torch, snnfx, nir
        >>> lif = nir.LIF(*(np.array([v]) for v in (2e-4, 1.0, 0.0, 1.0)))
        >>> model = snnfx.from_nir(nir.NIRGraph.from_list(lif), dt=1e-4)
        >>> [float(model(torch.full((1, 1), 1.5))) for _ in range(4)]
        [0.0, 1.0, 0.0, 1.0]
    """
    require_nir()
    graph: Any = path_or_graph if hasattr(path_or_graph, "nodes") else _read(path_or_graph)
    metadata = graph.metadata if isinstance(graph.metadata, dict) else {}
    dt = float(metadata.get(TIME_STEP, 1e-4)) if dt is None else float(dt)
    if not (math.isfinite(dt) and dt > 0):
        raise InputError("SNNFX816", f"dt={dt} is not a time step", why="it must be a positive number of seconds.")
    count = sum(type(node).__name__ == "Input" for node in graph.nodes.values())
    model = NIRModel(graph, dt) if count == 1 else _SeveralInputs(graph, dt)
    return model if device is None else model.to(device)


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return require_nir().read(path, type_check=False)
    except Exception as error:
        raise InputError(
            "SNNFX817", f"`{os.fspath(path)}` cannot be read", why=f"{type(error).__name__}: {error}."
        ) from error


class NIRModel(MemoryModule):
    """One time step of a NIR graph; made by `snnfx.from_nir`.

    Args:
        graph: a `nir.NIRGraph`.
        dt: the time step in seconds.
    """

    def __init__(self, graph: Any, dt: float) -> None:
        super().__init__()
        nodes, edges = _inlined(graph)
        kinds = {name: type(node).__name__ for name, node in nodes.items()}
        dtype = dtype_of(list(nodes.values()))
        self.dt = dt
        self.inputs = [name for name, kind in kinds.items() if kind == "Input" and not _sources(edges, name)]
        self.outputs = [name for name, kind in kinds.items() if kind == "Output" and not _targets(edges, name)]
        if not self.inputs or not self.outputs:
            raise InputError("SNNFX816", "the graph has no input or no output")
        self.modules_of: dict[str, str] = {}
        for name, node in nodes.items():
            if kinds[name] not in ("Input", "Output"):
                self.modules_of[name] = self._add(name, module_of(name, node, dt, dtype))
        stateful = {n for n, m in self.modules_of.items() if adapter_of(getattr(self, m)) is not None}
        delays = {n for n, m in self.modules_of.items() if isinstance(getattr(self, m), Delay)}
        delayed = _delayed_edges(graph, edges, self.inputs, stateful)
        self.previous: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for source in dict.fromkeys(a for a, _ in delayed):
            self.previous[source] = f"previous_{len(self.previous)}"
            self.shapes[source] = _shape(source, nodes)
            self.register_memory(self.previous[source], None)
        order = networkx.DiGraph()
        order.add_nodes_from(nodes)
        order.add_edges_from(e for e in edges if e not in delayed)
        self.plan = [
            (name, [(a, (a, name) in delayed) for a in _sources(edges, name)])
            for name in networkx.lexicographical_topological_sort(order, key=list(nodes).index)
            if name not in self.inputs
        ]
        for name, sources in self.plan:
            if not sources:
                raise graph_refusal(name, "nothing is connected to it.")
        assert delays <= stateful

    def _add(self, name: str, module: nn.Module) -> str:
        """Register a module under the name of its node, as far as attributes allow."""
        attribute = re.sub(r"\W", "_", name)
        while hasattr(self, attribute) or attribute in ("inputs", "outputs", "plan", "previous", "shapes"):
            attribute += "_"
        self.add_module(attribute, module)
        return attribute

    def forward(self, x: Tensor) -> Any:
        """Compute one time step: a tensor `[N, *]` -> a tensor `[N, *]`, or a tuple of them."""
        return self._step(x)

    def _step(self, *inputs: Tensor) -> Any:
        values = dict(zip(self.inputs, inputs, strict=True))
        before = {}
        for source, memory in self.previous.items():
            value = getattr(self, memory)
            before[source] = inputs[0].new_zeros(inputs[0].shape[0], *self.shapes[source]) if value is None else value
        for name, sources in self.plan:
            parts = [before[a] if is_delayed else values[a] for a, is_delayed in sources]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            values[name] = getattr(self, self.modules_of[name])(total) if name in self.modules_of else total
        for source, memory in self.previous.items():
            setattr(self, memory, values[source])
        results = tuple(values[name] for name in self.outputs)
        return results[0] if len(results) == 1 else results


class _SeveralInputs(NIRModel):
    """A model with several inputs, in the order of `inputs`."""

    def forward(self, *inputs: Tensor) -> Any:
        """Compute one time step: tensors `[N, *]` -> a tensor `[N, *]`, or a tuple of them."""
        return self._step(*inputs)


# -- graphs -----------------------------------------------------------------------------------------------------------


def _inlined(graph: Any, prefix: str = "") -> tuple[dict[str, Any], list[Edge]]:
    """Nodes and edges with nested graphs inlined; the inputs and outputs of a nested graph pass values on."""
    nodes: dict[str, Any] = {}
    entries: dict[str, str] = {}
    exits: dict[str, str] = {}
    edges: list[Edge] = []
    for name, node in graph.nodes.items():
        full = prefix + name
        if not hasattr(node, "nodes"):
            nodes[full] = node
            continue
        ports = [[f"{full}.{n}" for n, c in node.nodes.items() if type(c).__name__ == k] for k in ("Input", "Output")]
        if any(len(p) != 1 for p in ports):
            raise graph_refusal(full, "a nested graph must have one input and one output.")
        inner_nodes, inner_edges = _inlined(node, f"{full}.")
        nodes |= inner_nodes
        edges += inner_edges
        entries[full], exits[full] = ports[0][0], ports[1][0]
    for a, b in graph.edges:
        a, b = exits.get(prefix + a, prefix + a), entries.get(prefix + b, prefix + b)
        for name in (a, b):
            if name not in nodes:
                raise graph_refusal(name, "an edge refers to it, but the graph has no node of this name.")
        if (a, b) not in edges:
            edges.append((a, b))
    return nodes, edges


def _sources(edges: list[Edge], name: str) -> list[str]:
    return [a for a, b in edges if b == name]


def _targets(edges: list[Edge], name: str) -> list[str]:
    return [b for a, b in edges if a == name]


def _delayed_edges(graph: Any, edges: list[Edge], inputs: list[str], stateful: set[str]) -> set[Edge]:
    """The edges that carry the value of the previous step."""
    metadata = graph.metadata if isinstance(graph.metadata, dict) else {}
    recorded = metadata.get(DELAYED_EDGES)
    delayed = {(a, b) for a, b in json.loads(recorded)} & set(edges) if isinstance(recorded, str | bytes) else set()
    for a, b in _closing_edges([e for e in edges if e not in delayed], inputs):
        delayed |= _from_neuron(a, b, edges, stateful)
    remaining = networkx.DiGraph([e for e in edges if e not in delayed])
    if not networkx.is_directed_acyclic_graph(remaining):
        cycle = " -> ".join(a for a, _ in networkx.find_cycle(remaining))
        raise InputError("SNNFX816", f"the cycle {cycle} has no neuron", why="its values depend on themselves.")
    return delayed


def _closing_edges(edges: list[Edge], inputs: list[str]) -> Iterator[Edge]:
    """The edges that close a cycle, in a depth-first walk from the inputs."""
    state: dict[str, int] = {}

    def walk(start: str) -> Iterator[Edge]:
        stack = [(start, iter(_targets(edges, start)))]
        state[start] = 1
        while stack:
            name, targets = stack[-1]
            target = next(targets, None)
            if target is None:
                state[name] = 2
                stack.pop()
            elif state.get(target) == 1:
                yield name, target
            elif target not in state:
                state[target] = 1
                stack.append((target, iter(_targets(edges, target))))

    for start in [*inputs, *[a for a, _ in edges]]:
        if start not in state:
            yield from walk(start)


def _from_neuron(a: str, b: str, edges: list[Edge], stateful: set[str]) -> set[Edge]:
    """The edge after the neuron that leads to an edge which closes a cycle."""
    seen = set()
    while a not in stateful and (a, b) not in seen:
        seen.add((a, b))
        sources = _sources(edges, a)
        if len(sources) != 1:
            break
        a, b = sources[0], a
    return {(a, b)}


def _shape(name: str, nodes: Mapping[str, Any]) -> tuple[int, ...]:
    output = (nodes[name].output_type or {}).get("output")
    if output is None:
        raise graph_refusal(name, "its shape is unknown, but a cycle needs it.", "Run `graph.infer_types()`.")
    return tuple(int(n) for n in np.asarray(output).reshape(-1))
