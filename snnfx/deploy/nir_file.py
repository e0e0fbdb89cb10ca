"""Write `.nir` files: the parts of a net as nodes and edges of a NIR graph.

NIR describes neurons by differential equations. A file means their forward Euler discretisation with the step `dt`:

    v[t] = v[t-1] + dt / tau * (v_leak - v[t-1] + r * u[t])
    fires where v[t] > v_threshold, and then v[t] = v_reset
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from typing import Any

import networkx
import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from snnfx._version import __version__
from snnfx.deploy.neuron_fit import FittedNeuron
from snnfx.deploy.nir_forms import Term
from snnfx.deploy.nir_layers import Convolution, Dense, Flattening, Pooling
from snnfx.deploy.nir_parts import Part, parts_of
from snnfx.deploy.nir_step import AtenStep
from snnfx.deploy.packages import missing_packages
from snnfx.errors import ExportError, warn_once

__all__ = ["DELAYED_EDGES", "INITIAL", "TIME_STEP", "nir_graph", "require_nir"]

DELAYED_EDGES = "snnfx_delayed_edges"
"""Metadata of a graph: the edges that carry the value of the previous step, as JSON."""

TIME_STEP = "snnfx_dt"
"""Metadata of a graph: the time step of the export, in seconds."""

INITIAL = "snnfx_v_initial"
"""Metadata of a neuron: its potential before the first step, where NIR's readers assume another."""


def require_nir() -> Any:
    """The package nir; raises ExportError if it is missing (SNNFX803) or broken (SNNFX828)."""
    if missing_packages(["nir"]):
        raise ExportError(
            "SNNFX803",
            "nir is not installed",
            why="snnfx reads and writes NIR graphs with it.",
            hint="Run `pip install snnfx[nir]`.",
        )
    return importlib.import_module("nir")


def nir_graph(step: AtenStep, dt: float) -> Any:
    """The NIR graph of a recorded step.

    Args:
        step: the step.
        dt: the time step in seconds.

    Raises:
        ExportError: SNNFX813, a layer has no form in NIR; SNNFX814, a neuron has none.
    """
    return _Writer(step, dt).graph()


class _Writer:
    def __init__(self, step: AtenStep, dt: float) -> None:
        self.nir, self.step, self.dt = require_nir(), step, dt
        self.parts, self.outputs = parts_of(step)
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.delayed: list[tuple[str, str]] = []
        dtypes = {v.dtype for v in step.values.values() if isinstance(v, Tensor) and v.is_floating_point()}
        self.dtype = np.float64 if torch.float64 in dtypes else np.float32

    def graph(self) -> Any:
        order = {node: i for i, node in enumerate(self.step.graph.nodes)}
        parts = sorted(self.parts.values(), key=lambda p: order[p.node])
        for part in parts:
            _move_constant(part)
        names = {part.node: self._name(part) for part in parts}
        for part in parts:
            self.nodes[names[part.node]] = self._node(part)
        reach = self._reachable(parts)
        for part in parts:
            self._connect(part, names[part.node], names, reach)
        for i, part in enumerate(self.outputs):
            name = self._unique("output" if len(self.outputs) == 1 else f"output_{i}")
            self.nodes[name] = self.nir.Output({"output": np.array(part.shape)})
            self._connect(part, name, names, reach)
        metadata: dict[str, Any] = {TIME_STEP: self.dt, "generator": f"snnfx {__version__}"}
        if self.delayed:
            metadata[DELAYED_EDGES] = json.dumps(self.delayed)
        return self.nir.NIRGraph(self.nodes, self.edges, metadata=metadata)

    # -- names and edges ----------------------------------------------------------------------------------------------

    def _name(self, part: Part) -> str:
        if part.kind == "input":
            inputs = [p for p in self.parts.values() if p.kind == "input"]
            return self._unique("input" if len(inputs) == 1 else part.module)
        module = re.sub(r"\W", "_", part.module)
        return self._unique(module or (type(part.layer).__name__.lower() if part.layer else "neuron"))

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.nodes:
            count += 1
            candidate = f"{name}_{count}"
        # Reserves the name until the node is made.
        self.nodes[candidate] = None
        return candidate

    def _reachable(self, parts: Sequence[Part]) -> dict[Node, set[Node]]:
        graph = networkx.DiGraph()
        graph.add_nodes_from(p.node for p in parts)
        graph.add_edges_from((source, p.node) for p in parts for source, _ in p.operand.terms)
        return {p.node: networkx.descendants(graph, p.node) | {p.node} for p in parts}

    def _connect(self, part: Part, name: str, names: dict[Node, str], reach: dict[Node, set[Node]]) -> None:
        if bool(part.operand.constant.any()):
            raise _refused(part, "a constant is added to its input, which no layer before it can take as a bias.")
        if not part.operand.terms and part.kind != "input":
            raise _refused(part, "its input is constant.")
        for term, factor in part.operand.terms.items():
            self._edge(part, name, names[term[0]], term, factor, term[0] in reach.get(part.node, ()))

    def _edge(self, part: Part, name: str, source: str, term: Term, factor: Tensor, is_recurrent: bool) -> None:
        """The edge of one term, with a Delay and a Scale where it needs them."""
        delay, shape = term[1], tuple(factor.shape)
        is_first_delayed = delay > 0 and is_recurrent
        steps = delay - is_first_delayed
        chain = [source]
        if steps:
            chain.append(self._unique(f"{source}_delay"))
            self.nodes[chain[-1]] = self.nir.Delay(delay=np.full(shape, steps * self.dt, self.dtype))
        if not bool((factor == 1).all()):
            chain.append(self._unique(f"{source}_scale"))
            self.nodes[chain[-1]] = self.nir.Scale(scale=self._array(factor))
        edges = list(zip(chain, [*chain[1:], name], strict=True))
        if is_first_delayed:
            self.delayed.append(edges[0])
        self.edges += edges

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _array(self, value: Tensor) -> Any:
        return np.ascontiguousarray(value.detach().cpu().double().numpy().astype(self.dtype))

    def _node(self, part: Part) -> Any:
        if part.kind == "input":
            return self.nir.Input({"input": np.array(part.shape)})
        if part.neuron is not None:
            return self._neuron(part, part.neuron)
        layer = part.layer
        if isinstance(layer, Dense):
            if layer.bias is None:
                return self.nir.Linear(self._array(layer.weight))
            return self.nir.Affine(self._array(layer.weight), self._array(layer.bias))
        if isinstance(layer, Convolution):
            return self._convolution(layer)
        if isinstance(layer, Flattening):
            end = -1 if layer.end == len(layer.shape) - 1 else layer.end
            return self.nir.Flatten({"input": np.array(layer.shape)}, start_dim=layer.start, end_dim=end)
        assert isinstance(layer, Pooling)
        kind = self.nir.SumPool2d if layer.is_sum else self.nir.AvgPool2d
        sizes = {"kernel_size": layer.kernel, "stride": layer.stride, "padding": layer.padding}
        return kind(**{key: np.array(value) for key, value in sizes.items()})

    def _convolution(self, layer: Convolution) -> Any:
        weight = self._array(layer.weight)
        bias = np.zeros(weight.shape[0], self.dtype) if layer.bias is None else self._array(layer.bias)
        if len(layer.input_size) == 1:
            sizes = (layer.stride[0], layer.padding[0], layer.dilation[0])
            return self.nir.Conv1d(layer.input_size[0], weight, *sizes, 1, bias)
        return self.nir.Conv2d(layer.input_size, weight, layer.stride, layer.padding, layer.dilation, 1, bias)

    def _neuron(self, part: Part, neuron: FittedNeuron) -> Any:
        if neuron.threshold is not None and neuron.reset is None:
            return self._threshold(part, neuron)
        fires = {}
        if neuron.threshold is not None and neuron.reset is not None:
            fires = {"v_threshold": self._array(neuron.threshold), "v_reset": self._array(neuron.reset)}
        gain, leak = neuron.gains[0], neuron.leak
        if bool((leak == 1).all()):
            if bool(neuron.offset.any()):
                raise _refused(part, "its potential drifts without input, but NIR's integrators do not.")
            node = self.nir.IF if fires else self.nir.I
            rest = torch.zeros_like(leak)
            return self._with_initial(node(r=self._array(gain / self.dt), **fires), part, neuron, rest)
        if not bool(((leak >= 0) & (leak < 1)).all()):
            raise _refused(part, "the factor of its last potential is not between 0 and 1 for all elements.")
        rest = neuron.offset / (1 - leak)
        membrane = {"r": self._array(gain / (1 - leak)), "v_leak": self._array(rest), **fires}
        tau = self._array(self.dt / (1 - leak))
        if part.synapse is None:
            node = self.nir.LIF if fires else self.nir.LI
            return self._with_initial(node(tau=tau, **membrane), part, neuron, rest)
        synapse = part.synapse
        current = {
            "tau_syn": self._array(self.dt / (1 - synapse.leak)),
            "w_in": self._array(synapse.gains[0] / (1 - synapse.leak)),
        }
        node = self.nir.CubaLIF if fires else self.nir.CubaLI
        return self._with_initial(node(tau_mem=tau, **current, **membrane), part, neuron, rest)

    def _threshold(self, part: Part, neuron: FittedNeuron) -> Any:
        assert neuron.threshold is not None
        if not bool((neuron.gains[0] > 0).all()):
            raise _refused(part, "it fires below a threshold, but NIR's Threshold fires above it.")
        return self.nir.Threshold(threshold=self._array((neuron.threshold - neuron.offset) / neuron.gains[0]))

    def _with_initial(self, node: Any, part: Part, neuron: FittedNeuron, rest: Tensor) -> Any:
        expected = rest if neuron.reset is None else neuron.reset
        differs = (neuron.initial - expected).abs() > 1e-9 * (1 + expected.abs())
        if bool((differs & (neuron.leak != 0)).any()):
            node.metadata[INITIAL] = self._array(neuron.initial)
            name = "v_leak" if neuron.reset is None else "v_reset"
            warn_once(
                "SNNFX815",
                f"`{part.module or part.kind}` does not start at its {name}. NIR has no initial potential: only "
                "snnfx.from_nir reads it, from the metadata of the node.",
            )
        return node


def _move_constant(part: Part) -> None:
    """A constant in the input of a neuron becomes part of its resting potential or threshold."""
    if part.neuron is None or part.synapse is not None or not bool(part.operand.constant.any()):
        return
    constant = part.operand.constant.expand(part.shape)
    moved = part.neuron.offset + part.neuron.gains[0] * constant
    part.neuron = FittedNeuron(**{**vars(part.neuron), "offset": moved})
    part.operand.constant = torch.zeros((), dtype=torch.float64)


def _refused(part: Part, why: str) -> ExportError:
    return ExportError(
        "SNNFX814" if part.neuron is not None else "SNNFX813",
        f"`{part.module or part.kind}` has no form in NIR",
        where=part.node.meta.get("where", ""),
        why=why,
        hint="Replace this part, or export a .pt2 or .onnx file.",
    )
