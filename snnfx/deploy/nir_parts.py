"""A net as the nodes of a NIR graph: layers, neurons and their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.deploy.neuron_fit import FittedNeuron, NotFitted, fit_neuron
from snnfx.deploy.nir_forms import Form, Parts, Term, is_elementwise
from snnfx.deploy.nir_layers import Convolution, Dense, Layer, layer_of
from snnfx.deploy.nir_step import AtenStep
from snnfx.errors import ExportError
from snnfx.ir.facts import MODULE

__all__ = ["Part", "parts_of"]


@dataclass
class Part:
    """A node of a NIR graph to be.

    Args:
        node: the call whose value it is; for outputs the value that is returned.
        module: the module of the model that it comes from.
        kind: "input", "output", "layer" or "neuron".
        shape: the sizes of its output without the batch.
        operand: its input as a sum of other parts; empty for inputs.
        layer: for layers.
        neuron: for neurons; one gain, for the sum.
        synapse: the linear filter before the potential of a current-based neuron.
    """

    node: Node
    module: str
    kind: str
    shape: tuple[int, ...]
    operand: Form = field(default_factory=Form)
    layer: Layer | None = None
    neuron: FittedNeuron | None = None
    synapse: FittedNeuron | None = None


def parts_of(step: AtenStep) -> tuple[dict[Node, Part], list[Part]]:
    """The parts by their node, and the outputs.

    Raises:
        ExportError: SNNFX813, a layer has no form in NIR; SNNFX814, a neuron.
    """
    builder = _Builder(step)
    outputs = builder.build()
    _merge_synapses(builder.parts, outputs)
    _fold_into_neurons(list(builder.parts.values()), builder.forms.normalized)
    _fold_into_layers(builder.parts, outputs)
    return builder.parts, outputs


class _Builder:
    def __init__(self, step: AtenStep) -> None:
        self.step = step
        self.forms = Parts(step)
        self.parts: dict[Node, Part] = {}

    def build(self) -> list[Part]:
        for node in self.step.inputs:
            self.parts[node] = Part(node, self.step.inputs[node], "input", self.step.features(node))
        outputs, pending = [], list[Form]()
        for node in self.step.outputs:
            form = self._resolved(node)
            outputs.append(Part(node, "", "output", self.step.features(node), form))
            pending.append(form)
        while pending:
            for source, _ in pending.pop().terms:
                if source not in self.parts:
                    part = self.parts[source] = self._part(source)
                    pending.append(part.operand)
        return outputs

    def _resolved(self, node: Node) -> Form:
        """The form of a value whose sources are layers, neurons and inputs: linear units without states dissolve."""
        form = self.forms.form(node)
        result = Form(constant=form.constant)
        for (source, delay), factor in form.terms.items():
            linear = self._linear_unit(source)
            inner = Form({(source, 0): torch.ones_like(factor)}) if linear is None else linear
            for _ in range(delay):
                inner = inner.delayed()
            result = result.plus(inner.scaled(factor))
        return result

    def _linear_unit(self, source: Node) -> Form | None:
        if source in self.forms.core_of or source in self.step.inputs or not is_elementwise(source):
            return None
        unit = self.forms.unit(source)
        if unit.slots:
            return None
        fitted = self._fit(source)
        if fitted.threshold is not None:
            return None
        result = Form(constant=fitted.offset)
        for node, gain in zip(unit.inputs, fitted.gains, strict=True):
            result = result.plus(self._resolved(node).scaled(gain))
        return result

    def _part(self, node: Node) -> Part:
        shape = self.step.features(node)
        if node in self.forms.core_of or is_elementwise(node):
            return self._neuron(node, shape)
        layer, operand = layer_of(node, self.forms)
        return Part(node, self._module_of_layer(node), "layer", shape, self._resolved(operand), layer)

    def _neuron(self, node: Node, shape: tuple[int, ...]) -> Part:
        unit, fitted = self.forms.unit(node), self._fit(node)
        first = next((g for g in fitted.gains if bool((g != 0).all())), None)
        if first is None:
            raise self._refused(node, "some of its elements do not read its input.")
        operand = Form()
        for source, gain in zip(unit.inputs, fitted.gains, strict=True):
            operand = operand.plus(self._resolved(source).scaled(gain / first))
        fitted = replace(fitted, gains=(first,))
        return Part(node, self._module_of_unit(node), "neuron", shape, operand, neuron=fitted)

    def _fit(self, node: Node) -> FittedNeuron:
        try:
            return fit_neuron(self.forms.unit(node), self.step)
        except NotFitted as reason:
            raise self._refused(node, str(reason)) from reason

    def _refused(self, node: Node, why: str) -> ExportError:
        module = self._module_of_unit(node) or node.meta.get("operation", str(node.target))
        return ExportError(
            "SNNFX814",
            f"`{module}` has no form in NIR",
            where=node.meta.get("where", ""),
            why=why,
            hint="Use a neuron with a constant threshold and a reset to a value, such as snnfx.neuron.LIFNode(), or "
            "export a .pt2 or .onnx file.",
        )

    def _module_of_unit(self, node: Node) -> str:
        slots = self.forms.unit(node).slots
        names = [name for name, slot in self.step.slots.items() if slot in slots]
        return names[0].rpartition(".")[0] if names else MODULE.of(node)

    def _module_of_layer(self, node: Node) -> str:
        pending = list(node.all_input_nodes)
        while pending:
            n = pending.pop(0)
            if n in self.step.constants and id(self.step.constants[n]) in self.step.names:
                return self.step.names[id(self.step.constants[n])].rpartition(".")[0]
            if n not in self.forms.varying:
                pending += n.all_input_nodes
        return MODULE.of(node)


def _uses(parts: dict[Node, Part], outputs: list[Part]) -> Iterator[tuple[Part, Term, Tensor]]:
    for part in (*parts.values(), *outputs):
        for term, factor in part.operand.terms.items():
            yield part, term, factor


def _merge_synapses(parts: dict[Node, Part], outputs: list[Part]) -> None:
    """Leaky integrators that only one neuron reads become its synapse (CubaLIF, CubaLI)."""
    for part in list(parts.values()):
        if part.neuron is None or part.synapse is not None or not bool(part.neuron.leak.any()):
            continue
        terms = list(part.operand.terms.items())
        if len(terms) != 1 or bool(part.operand.constant.any()):
            continue
        ((source, delay), factor), filter_ = terms[0], parts.get(terms[0][0][0])
        users = [p for p, (n, _), _ in _uses(parts, outputs) if n is source]
        if delay or filter_ is None or filter_.neuron is None or filter_.synapse is not None or len(users) != 1:
            continue
        synapse = filter_.neuron
        if synapse.threshold is not None or bool(synapse.offset.any()) or bool(synapse.initial.any()):
            continue
        if not bool(((synapse.leak < 1) & (part.neuron.leak < 1)).all()) or not bool(synapse.leak.any()):
            continue
        part.synapse = synapse
        part.neuron = replace(part.neuron, gains=(part.neuron.gains[0] * factor,))
        part.operand = filter_.operand
        del parts[source]


def _fold_into_neurons(parts: list[Part], normalized: set[Node]) -> None:
    """A factor of all inputs of a neuron becomes its gain, but that of a BatchNorm belongs to the layer before it."""
    for part in parts:
        if part.neuron is None or not part.operand.terms or any(n in normalized for n, _ in part.operand.terms):
            continue
        factors = list(part.operand.terms.values())
        common = factors[0]
        is_uniform = bool((common == common.flatten()[0]).all())
        if is_uniform and all(torch.equal(f, common) for f in factors) and float(common.flatten()[0]) != 1.0:
            part.operand = part.operand.scaled(1.0 / common)
            part.operand.terms = {t: torch.ones_like(k) for t, k in part.operand.terms.items()}
            if part.synapse is None:
                part.neuron = replace(part.neuron, gains=(part.neuron.gains[0] * common,))
            else:
                part.synapse = replace(part.synapse, gains=(part.synapse.gains[0] * common,))


def _fold_into_layers(parts: dict[Node, Part], outputs: list[Part]) -> None:
    """Factors and constants of each channel, such as those of BatchNorm, become part of the layer before them."""
    for part in parts.values():
        if not isinstance(part.layer, Dense | Convolution):
            continue
        uses = [(user, term, k) for user, term, k in _uses(parts, outputs) if term[0] is part.node]
        channels = [_of_channels(k) for _, _, k in uses]
        if not uses or any(c is None or not torch.equal(c, channels[0]) for c in channels):  # type: ignore[arg-type]
            continue
        factor = channels[0]
        assert factor is not None
        users = [user for user, _, _ in uses]
        constants = [_of_channels(_expanded_constant(u, part.shape)) for u in users]
        constant = constants[0]
        same = constant is not None and all(c is not None and torch.equal(c, constant) for c in constants)
        same = same and len({id(u) for u in users}) == len(users) and not any(delay for _, (_, delay), _ in uses)
        offset = constant if same else None
        if bool((factor == 1).all()) and (offset is None or not bool(offset.any())):
            continue
        layer = part.layer
        weight = layer.weight.double() * factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
        bias = torch.zeros_like(factor) if layer.bias is None else layer.bias.double() * factor
        bias = bias if offset is None else bias + offset
        has_bias = layer.bias is not None or bool(bias.any())
        part.layer = replace(layer, weight=weight, bias=bias if has_bias else None)
        for user, term, k in uses:
            user.operand.terms[term] = torch.ones_like(k)
            if offset is not None:
                user.operand.constant = torch.zeros((), dtype=torch.float64)


def _expanded_constant(user: Part, source: tuple[int, ...]) -> Tensor:
    """The constant in the input of a part; a layer has another shape than its input."""
    constant = user.operand.constant
    return constant.expand(user.shape if user.layer is None else torch.broadcast_shapes(source, constant.shape))


def _of_channels(value: Tensor) -> Tensor | None:
    """One number for each channel, or None if it varies inside of one."""
    flat = value.reshape(value.shape[0], -1) if value.dim() else value.reshape(1, 1)
    return flat[:, 0] if bool((flat == flat[:, :1]).all()) else None
