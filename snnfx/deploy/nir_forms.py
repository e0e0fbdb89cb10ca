"""The values of a recorded step as sums of scaled sources, and the sources as layers and units.

A source is an input of the net, the output of a layer, or the output of a unit (a neuron or a threshold). Between
them lie sums, factors and BatchNorm in evaluation mode, which a NIR graph has as edges, Scale nodes and biases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx
import torch
from torch import Tensor
from torch.fx import Node

from snnfx.deploy.neuron_fit import Unit
from snnfx.deploy.nir_step import AtenStep, refusal, run_nodes

__all__ = ["Form", "Parts", "Term"]

_aten: Any = torch.ops.aten

_COPIES = (
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
    _aten._to_copy.default,
    _aten.expand.default,
)
_FILLED = (_aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default)
_MASKED = (_aten.index_put.default, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor)
_NORMS = (
    _aten._native_batch_norm_legit_no_training.default,
    _aten.native_batch_norm.default,
    _aten.cudnn_batch_norm.default,
)
_SUMS = (_aten.add.Tensor, _aten.sub.Tensor, _aten.rsub.Scalar, _aten.add.Scalar, _aten.sub.Scalar)
_FACTORS = (_aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar)

Term = tuple[Node, int]
"""A source, and the number of time steps by which it is delayed."""


@dataclass
class Form:
    """A sum of scaled sources and a constant; the factors have the shape of the value without the batch."""

    terms: dict[Term, Tensor] = field(default_factory=dict)
    constant: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def scaled(self, factor: Tensor | float) -> Form:
        """The form times a factor."""
        return Form({t: k * factor for t, k in self.terms.items()}, self.constant * factor)

    def plus(self, other: Form) -> Form:
        """The sum of two forms, without terms that cancel."""
        terms = dict(self.terms)
        for term, factor in other.terms.items():
            terms[term] = terms[term] + factor if term in terms else factor
        return Form({t: k for t, k in terms.items() if bool(k.any())}, self.constant + other.constant)

    def delayed(self) -> Form:
        """The form of the previous step."""
        return Form({(node, delay + 1): k for (node, delay), k in self.terms.items()}, self.constant)


class Parts:
    """The forms and units of a recorded step.

    Args:
        step: the step.
    """

    def __init__(self, step: AtenStep) -> None:
        self.step = step
        self.varying = step.varying
        self.order = {node: i for i, node in enumerate(step.graph.nodes)}
        self.core_of: dict[Node, frozenset[Node]] = {}
        for core in self._cores():
            self.core_of |= dict.fromkeys(core, core)
        self._forms: dict[Node, Form] = {}
        self.normalized: set[Node] = set()
        """Sources that a BatchNorm reads."""

    def _cores(self) -> Iterator[frozenset[Node]]:
        """The element-wise calls and states that depend on each other across time."""
        graph = networkx.DiGraph()
        slots = set(self.step.slots.values())
        inside = {n for n in self.varying if n in slots or is_elementwise(n)}
        for node in inside:
            graph.add_edges_from((n, node) for n in node.all_input_nodes if n in inside)
        graph.add_edges_from((after, slot) for slot, after in self.step.following.items() if after in inside)
        for core in networkx.strongly_connected_components(graph):
            # A state that keeps its value is a constant.
            if len(core) > 1:
                yield frozenset(core)

    # -- forms --------------------------------------------------------------------------------------------------------

    def form(self, node: Node) -> Form:
        """A value as a sum of scaled sources."""
        if node not in self._forms:
            self._forms[node] = self._form(node)
        return self._forms[node]

    def _form(self, node: Node) -> Form:
        if node not in self.varying:
            return Form(constant=self._constant(node))
        if node in self.step.following:
            return self._previous(node)
        if node in self.core_of or node in self.step.inputs:
            return self._source(node)
        return self._sum(node) or self._source(node)

    def _source(self, node: Node) -> Form:
        return Form({(node, 0): torch.ones(self.step.features(node), dtype=torch.float64)})

    def _previous(self, slot: Node) -> Form:
        after = self.step.following[slot]
        if after is slot:
            raise refusal(slot, "it is a state that never changes.")
        form = self.form(after).delayed()
        if bool(self.step.initial[slot].any()) or bool(form.constant.any()):
            raise refusal(
                slot, "it is a value of the previous step that does not start at 0, but a recurrent edge of NIR does."
            )
        return form

    def _sum(self, node: Node) -> Form | None:
        """The form of a linear element-wise call, or None."""
        target, args = node.target, node.args
        if target in _COPIES and self._is_floating(node) and isinstance(args[0], Node):
            return self._broadcast(self.form(args[0]), node)
        if target is _aten.neg.default:
            return self.form(args[0]).scaled(-1.0)  # type: ignore[arg-type]
        if target in _SUMS:
            left, right = (self._operand(a) for a in args[:2])
            alpha = float(node.kwargs.get("alpha", args[2] if len(args) > 2 else 1))  # type: ignore[arg-type]
            if target is _aten.rsub.Scalar:
                left, right = right, left
            sign = 1.0 if target in (_aten.add.Tensor, _aten.add.Scalar) else -1.0
            return self._broadcast(left, node).plus(self._broadcast(right.scaled(sign * alpha), node))
        if target in _FACTORS and not node.kwargs:
            return self._factor(node)
        if self._is_norm(node):
            return self._norm(node)
        return None

    def _factor(self, node: Node) -> Form | None:
        left, right = (self._operand(a) for a in node.args[:2])
        is_quotient = node.target in (_aten.div.Tensor, _aten.div.Scalar)
        if (left.terms and right.terms) or (is_quotient and right.terms):
            return None
        if right.terms:
            left, right = right, left
        factor = right.constant.reciprocal() if is_quotient else right.constant
        left = self._broadcast(left, node)
        shape = self.step.features(node)
        product = left.scaled(_expanded(factor, shape))
        return Form({t: k for t, k in product.terms.items() if bool(k.any())}, product.constant)

    def _operand(self, value: Any) -> Form:
        if isinstance(value, Node):
            return self.form(value)
        return Form(constant=torch.as_tensor(value, dtype=torch.float64))

    def _broadcast(self, form: Form, node: Node) -> Form:
        shape = self.step.features(node)
        for (source, _), factor in form.terms.items():
            if tuple(factor.shape) != shape:
                raise refusal(
                    node,
                    f"it expands {list(self.step.features(source))} to {list(shape)} (without the batch), but the "
                    "edges of NIR keep the shape.",
                )
        return Form(form.terms, form.constant)

    def _is_floating(self, node: Node) -> bool:
        value = self.step.values[node]
        return isinstance(value, Tensor) and value.is_floating_point()

    def _is_norm(self, node: Node) -> bool:
        norm = node.args[0] if _is_getitem(node) and node.args[1] == 0 else None
        return isinstance(norm, Node) and norm.target in _NORMS

    def _norm(self, node: Node) -> Form:
        """BatchNorm in evaluation mode: a factor and an offset for each channel, from two values of its function."""
        norm: Any = node.args[0]
        operand = norm.args[0]
        values = {n: v.double() if v.is_floating_point() else v for n, v in self.step.constants.items()}
        results = []
        for number in (0.0, 1.0):
            trial: dict[Node, Any] = {**values, operand: torch.full_like(self.step.values[operand], number).double()}
            run_nodes([norm, node], trial)
            results.append(trial[node][0])
        offset, top = results
        scaled = self.form(operand).scaled(top - offset)
        self.normalized |= {source for source, _ in scaled.terms}
        return Form(scaled.terms, scaled.constant + offset)

    def _constant(self, node: Node) -> Tensor:
        value = self.step.values[node].detach().double()
        if not value.dim():
            return value  # type: ignore[no-any-return]
        batched = max((self.step.values[u].dim() for u in node.users if self._is_tensor(u)), default=value.dim())
        if value.dim() == batched:
            if value.shape[0] != 1 and bool((value != value[:1]).any()):
                raise refusal(node, "it is a constant that differs between the samples of a batch.")
            return value[0]  # type: ignore[no-any-return]
        return value  # type: ignore[no-any-return]

    def _is_tensor(self, node: Node) -> bool:
        return isinstance(self.step.values.get(node), Tensor)

    # -- units --------------------------------------------------------------------------------------------------------

    def unit(self, output: Node) -> Unit:
        """The unit whose output a value is: a core with the calls between it and the value, or calls without states."""
        nodes: set[Node] = set()
        inputs: dict[Node, None] = {}
        cores: set[frozenset[Node]] = set()
        loose = False
        pending = [output]
        while pending:
            node = pending.pop()
            if node in nodes or node in inputs:
                continue
            core = self.core_of.get(node)
            if core is not None:
                if core not in cores:
                    cores.add(core)
                    nodes |= core
                    inputs |= dict.fromkeys(p for n in core for p in self._varying_inputs(n) if p not in core)
            elif node is not output and not self._is_nonlinear(node) and not self._leads_to_core(node):
                inputs[node] = None
                loose = True
            else:
                nodes.add(node)
                pending += self._varying_inputs(node)
        if len(cores) > 1 or (cores and loose):
            return self._stateless(output)
        inputs = {n: None for n in inputs if n not in nodes}
        slots = tuple(s for s in self.step.slots.values() if s in nodes)
        return self._made(nodes, slots, inputs, output)

    def _stateless(self, output: Node) -> Unit:
        """The calls without states before a value, up to layers, neurons and sums."""
        nodes: set[Node] = set()
        inputs: dict[Node, None] = {}
        pending = [output]
        while pending:
            node = pending.pop()
            if node is output or self._is_nonlinear(node):
                nodes.add(node)
                pending += [n for n in self._varying_inputs(node) if n not in nodes]
            else:
                inputs[node] = None
        return self._made(nodes, (), inputs, output)

    def _made(self, nodes: set[Node], slots: tuple[Node, ...], inputs: dict[Node, None], output: Node) -> Unit:
        states = set(self.step.slots.values())
        constant = self._constant_calls(nodes)
        calls = sorted((nodes | constant) - states, key=self.order.__getitem__)
        return Unit(tuple(calls), slots, tuple(sorted(inputs, key=self.order.__getitem__)), output)

    def _constant_calls(self, nodes: set[Node]) -> set[Node]:
        """The calls on constants that the nodes read, such as `exp(-1 / tau)`."""
        found: set[Node] = set()
        pending = list(nodes)
        while pending:
            new = [
                n
                for n in pending.pop().all_input_nodes
                if n not in self.varying and n not in self.step.constants and n not in found
            ]
            found |= set(new)
            pending += new
        return found

    def _varying_inputs(self, node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if n in self.varying]

    def _is_nonlinear(self, node: Node) -> bool:
        """Whether it is an element-wise call without a form of its own, outside of the cores."""
        if node in self.core_of or not is_elementwise(node) or node in self.step.following:
            return False
        return self._is_floating(node) is False or (node, 0) in self.form(node).terms

    def _leads_to_core(self, node: Node) -> bool:
        """Whether it is the sum or copy of one core and constants."""
        if not is_elementwise(node):
            return False
        sources = [source for source, delay in self.form(node).terms if not delay]
        return len(sources) == len(self.form(node).terms) and bool(sources) and all(s in self.core_of for s in sources)


def is_elementwise(node: Node) -> bool:
    """Whether a call computes each element of its result from the same element of its arguments."""
    if node.op != "call_function":
        return False
    target = node.target
    if target in _COPIES or target in _FILLED:
        return True
    if target in _MASKED:
        masks = node.args[1] if target is _aten.index_put.default else [node.args[1]]
        return isinstance(masks, list | tuple) and len(masks) == 1
    return torch.Tag.pointwise in getattr(target, "tags", ())


def _is_getitem(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _expanded(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return factor.expand(shape) if factor.dim() <= len(shape) else factor
