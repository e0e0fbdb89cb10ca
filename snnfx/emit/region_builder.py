"""Build the graph of a region from nodes of the step graph.

A region graph takes modules and parameters as arguments, so that these stay where the model has them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node, map_arg

from snnfx.analysis.batch_norm_folding import layer_of_norm
from snnfx.analysis.dependence import analyse_dependence
from snnfx.analysis.first_step_match import FirstStepOfLoop
from snnfx.analysis.image_operations import (
    convolution_of,
    image_of,
    is_convolution,
    takes_any_layout,
    weights_of,
)
from snnfx.analysis.statistic_reads import update_chains
from snnfx.emit.shape_dependence import unexpanded_dimensions
from snnfx.errors import CaptureError
from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import BATCH_DIM, CHANNELS_LAST, EVENTS, FOLDS_DIM_0, IN_WEIGHTS, KIND, SITE, SLOT, SPIKES, VARYING
from snnfx.ir.nodes import is_size
from snnfx.ir.printing import location_of
from snnfx.ir.program import StepProgram
from snnfx.lowering.choices.image_formats import fastest_format
from snnfx.lowering.events.event_layers import (
    FUNCTIONS,
    call_layer_by_events,
    call_normed_layer_by_events,
)
from snnfx.lowering.events.spike_matrices import matmul_by_events
from snnfx.ops.folded_weights import call_layer, call_norm
from snnfx.ops.memory_format import image_format, row_major
from snnfx.ops.sequence_functions import call_module, expand_initial_value, repeat_for_samples
from snnfx.regions.sequence_region import RegionGraph

__all__ = ["RegionBuilder", "is_batch_first", "same_for_all_samples", "whole_step"]

_SMALL = 1 << 16
"""Fewer image elements take longer to convert to channels-last and back than a convolution gains."""


class RegionBuilder:
    """Builds the graphs of one region from nodes of the step graph.

    Args:
        program: the step program.
        nodes: the nodes of the region, in program order.
        slots: names of the slots whose state the region carries.
        stop: nodes at which `add_values` stops because another region computes them (default: nodes not in `nodes`).
        folds: whether the region folds T into the batch (default: by the kind of its nodes).
    """

    def __init__(
        self,
        program: StepProgram,
        nodes: Sequence[Node],
        slots: Sequence[str],
        stop: Iterable[Node] | None = None,
        folds: bool | None = None,
    ) -> None:
        self.program, self.slots, self.folds = program, slots, folds
        self.inside = dict.fromkeys(nodes)
        self.stop = set(stop) if stop is not None else set()
        self.constants: dict[Node | str, None] = {}
        self.input_nodes: dict[Node, None] = {}
        self.initial: dict[str, Any] = {}
        self.initial_nodes: dict[Node, None] = {}
        for node in nodes:
            self._need_operands(node)

    @property
    def inputs(self) -> list[Node]:
        """The operands from outside the region that vary over time."""
        return list(self.input_nodes)

    def add_initial_values(self, slots: Sequence[str]) -> None:
        """Add the operands of the initial values of the slots as inputs."""
        by_slot = dict(zip((s.name for s in self.program.slots), self.program.initial_values, strict=True))
        self.stop |= {n for r in self.program.regions for n in r.nodes} or set(self.inside)
        self.add_values([by_slot[slot] for slot in slots])

    def add_first_step(self, step: FirstStepOfLoop) -> None:
        """Add the modules, attributes and values that a first step of other operations reads."""
        self.constants.update(dict.fromkeys(str(node.target) for node in step.nodes if node.op == "call_module"))
        known = {key.target for key in self.constants if isinstance(key, Node)}
        self.constants.update(dict.fromkeys(node for node in step.attributes if node.target not in known))
        for node in step.reads.values():
            self._need(node)

    def first_step_graph(
        self, first: StepProgram, step: FirstStepOfLoop, outputs: Sequence[Node], slots: Sequence[str]
    ) -> RegionGraph:
        """The graph `(*constants, *inputs) -> (outputs, next states)` of a first step of other operations.

        Args:
            first: the program of the first step.
            step: the part of it that the loop computes.
            outputs: the nodes of the later steps whose values the loop returns.
            slots: the slots of the loop.
        """
        graph = fx.Graph()
        given: dict[Node, Node] = {}
        modules: dict[str, Node] = {}
        for key in (*self.constants, *self.input_nodes):
            placeholder = add_placeholder(graph, key if isinstance(key, str) else key.name)
            if isinstance(key, str):
                modules[key] = placeholder
            else:
                given[key] = placeholder
        if not self.input_nodes:
            add_placeholder(graph, "time")
        attributes = {node.target: value for node, value in given.items() if node.op == "get_attr"}
        env: dict[Node, Any] = {node: given[source] for node, source in step.reads.items()}
        env.update({node: attributes[node.target] for node in step.attributes})
        readers = {SLOT.of(node): node for node in step.nodes if SLOT.is_known(node)}
        copier = _Copier(graph, env, modules, first, readers, {})
        copier.keep_order_of_updates(step.nodes)
        for node in step.nodes:
            copier.copy(node)
        results = tuple([copier.copy(step.counterparts[node]) for node in outputs])
        graph.output((results, tuple([copier.argument(step.next_states[slot]) for slot in slots])))
        return RegionGraph(nn.Module(), graph, class_name="RegionGraph")

    def add_values(self, values: Iterable[Any]) -> None:
        """Compute further values in the region, back to `stop`, placeholders and attributes."""
        stack = [v for v in values if isinstance(v, Node)]
        while stack:
            node = stack.pop()
            if node in self.inside or node in self.initial_nodes:
                continue
            if node in self.stop or node.op in ("placeholder", "get_attr"):
                self._need(node)
                continue
            self.initial_nodes[node] = None
            if node.op == "call_module":
                self.constants[str(node.target)] = None
            stack.extend(node.all_input_nodes)

    def _need_operands(self, node: Node) -> None:
        if node.op == "call_module":
            self.constants[str(node.target)] = None
        for operand in node.all_input_nodes:
            self._need(operand)

    def _need(self, operand: Node) -> None:
        if operand in self.inside or (operand.op == "placeholder" and SLOT.of(operand) in self.slots):
            return
        if is_size(operand):
            self._need_operands(operand)
        elif operand.op == "get_attr" or not (VARYING.of(operand)):
            # An invariant value with a batch dimension is an input of a fold, which repeats it over time.
            if operand.op != "get_attr" and self._folds() and BATCH_DIM.of(operand) is not None:
                self.input_nodes[operand] = None
            else:
                self.constants[operand] = None
        else:
            self.input_nodes[operand] = None

    def _folds(self) -> bool:
        return self.folds if self.folds is not None else any(KIND.of(node) == "fold" for node in self.inside)

    def graph_module(
        self,
        outputs: Sequence[Node],
        next_states: Sequence[Any] | None = None,
        slots: Sequence[str] = (),
        first: bool = False,
        extra_input: bool = False,
    ) -> RegionGraph:
        """The graph `(*constants, *inputs[, state]) -> outputs` or `-> (outputs, next states)`.

        Args:
            outputs: nodes whose values the graph returns, as a tuple.
            next_states: the next values of the slots; the state is then the last argument.
            slots: the slots, in the order of the state tuple.
            first: build the first step from the reset state: slots take their initial values, and no state argument.
            extra_input: add an unused input, for a loop that reads only constants.
        """
        graph = fx.Graph()
        env: dict[Node, Any] = {}
        modules: dict[str, Node] = {}
        for key in self.constants:
            if isinstance(key, str):
                modules[key] = add_placeholder(graph, key)
            else:
                env[key] = add_placeholder(graph, key.name)
        for node in self.input_nodes:
            env[node] = add_placeholder(graph, node.name)
            env[node].meta.update({k: v for k, v in node.meta.items() if k == "val"})
        if extra_input:
            add_placeholder(graph, "time")
        # A peeled first step does not read a slot whose initial value capture wrote into the graph.
        by_name = self.program.nodes_by_name
        readers = {s.name: by_name[s.placeholder] for s in self.program.slots if s.placeholder in by_name}
        slot_nodes = {name: node for name, node in readers.items() if name in slots}
        if next_states is not None and not first:
            state = add_placeholder(graph, "state")
            for index, slot in enumerate(slots):
                if slot in slot_nodes:
                    env[slot_nodes[slot]] = graph.call_function(operator.getitem, (state, index))
        norms = self._norms_of_layers(outputs)
        builder = _Copier(graph, env, modules, self.program, slot_nodes if first else {}, norms)
        if first:
            builder.keep_order_of_updates(self.inside)
        for node in self.inside:
            builder.copy(node)
        results = [builder.copy(node) for node in outputs]
        if first and next_states is not None:
            next_of = dict(zip(slots, next_states, strict=True))
            for index, node in enumerate(outputs):
                # A slot that is read outside the loop needs the shape of the later steps.
                if node in builder.first_slots:
                    slot = builder.first_slots[node]
                    next_state, has_batch = builder.argument(next_of[slot]), is_batch_first(builder.initial_of[slot])
                    # Readers inside the loop get the initial value itself.
                    initial = builder.initial_of[slot]
                    unexpanded = unexpanded_dimensions(self.program, node, initial, skip=self.inside)
                    results[index] = graph.call_function(
                        expand_initial_value, (results[index], next_state, slot, has_batch, unexpanded)
                    )
        if next_states is None:
            dims = ((node, BATCH_DIM.of(node)) for node in self.input_nodes)
            samples = next(((env[node], dim) for node, dim in dims if isinstance(dim, int)), None)
            for index, node in enumerate(outputs):
                if samples is not None and same_for_all_samples(node):
                    results[index] = graph.call_function(repeat_for_samples, (results[index], *samples))
            graph.output(tuple(results))
        else:
            graph.output((tuple(results), tuple(builder.argument(value) for value in next_states)))
        return RegionGraph(nn.Module(), graph, class_name="RegionGraph")

    def _norms_of_layers(self, outputs: Sequence[Node]) -> dict[Node, Node]:
        """Layers whose weights may absorb a BatchNorm, with that BatchNorm (see `snnfx.passes.fold_batch_norm`).

        Layers whose own result is an output are excluded.
        """
        pairs = {layer_of_norm(node): node for node in self.inside if IN_WEIGHTS.of(node)}
        return {layer: norm for layer, norm in pairs.items() if layer in self.inside and layer not in outputs}


def whole_step(program: StepProgram) -> RegionBuilder:
    """A builder for the whole program as one region with all slots."""
    initial_only = analyse_dependence(program).initial_only
    nodes = [n for n in program.graph.nodes if (n.op.startswith("call") and n not in initial_only) or SLOT.is_known(n)]
    builder = RegionBuilder(program, nodes, [slot.name for slot in program.slots])
    builder.add_values([*program.outputs, *program.next_states, *program.initial_values])
    return builder


class _Copier:
    """Copies nodes into a region graph on demand; in a first step, slots become their initial values."""

    def __init__(
        self,
        graph: fx.Graph,
        env: dict[Node, Any],
        modules: dict[str, Node],
        program: StepProgram,
        first_slots: dict[str, Node],
        norms: dict[Node, Node],
    ) -> None:
        self.graph, self.env, self.modules, self.program = graph, env, modules, program
        self.norms, self.normalized = norms, set(norms.values())
        self.initial_of = dict(zip((s.name for s in program.slots), program.initial_values, strict=True))
        self.first_slots = {node: slot for slot, node in first_slots.items()}
        self.open: set[Node] = set()
        self.preceding: dict[Node, list[Node]] = {}
        self.reformatted: dict[tuple[Any, ...], Node] = {}

    def keep_order_of_updates(self, nodes: Iterable[Node]) -> None:
        """Copy calls that update a buffer, and reads of it, in program order, also for an initial value."""
        for chain in update_chains(self.program, nodes):
            for node, following in itertools.pairwise(chain):
                self.preceding.setdefault(following, []).append(node)

    def argument(self, value: Any) -> Any:
        return map_arg(value, self.copy)

    def operands(self, node: Node) -> tuple[Any, Any]:
        """The arguments of a copy of `node`, in the memory format that `snnfx.passes.choose_memory_format` chose."""
        takes_images = CHANNELS_LAST.is_known(node) and is_convolution(self.program, node)
        image = image_of(node) if takes_images else None
        needs_row_major = not takes_any_layout(self.program, node)

        def operand(value: Node) -> Any:
            if value is image:
                alone = _least_images(node, value)
                least, settings = max(weights_of(self.program, node), alone), convolution_of(self.program, node)
                if settings is None:
                    return self.in_format(value, image_format, least)
                return self.in_format(value, fastest_format, least, (*settings, alone > 0))
            if needs_row_major and CHANNELS_LAST.of(value):
                return self.in_format(value, row_major)
            return self.copy(value)

        return map_arg(tuple(node.args), operand), map_arg(node.kwargs, operand)

    def in_format(self, value: Node, convert: Callable[..., Any], *more: Any) -> Any:
        key = (value, convert, *more)
        if key not in self.reformatted:
            self.reformatted[key] = self.graph.call_function(convert, (self.copy(value), *more))
        return self.reformatted[key]

    def copy(self, node: Node) -> Any:
        pending = [node]  # no recursion: a graph may be deeper than the stack of Python
        while node not in self.env:
            current = pending[-1]
            missing = [n for n in self._read_by(current) if n not in self.env]
            if current in self.env or not missing:
                self._copy_one(pending.pop())
                continue
            self.open.add(current)
            for operand in missing:
                if operand in self.open:
                    raise CaptureError(
                        "SNNFX210",
                        f"the initial value of `{operand.name}` cannot be computed",
                        where=location_of(operand),
                        why="it depends on a value that itself needs this state.",
                        hint="Make the initial value a number, a tensor, or a function of the inputs only.",
                    )
            pending.append(missing[0])
        return self.env[node]

    def _read_by(self, node: Node) -> list[Node]:
        if node not in self.first_slots:
            return [*self.preceding.get(node, ()), *node.all_input_nodes]
        operands: list[Node] = []
        map_arg(self.initial_of[self.first_slots[node]], operands.append)
        return operands

    def _copy_one(self, node: Node) -> None:
        if node in self.env:
            return
        if node in self.first_slots:
            self.env[node] = self.argument(self.initial_of[self.first_slots[node]])
        else:
            args, kwargs = self.operands(node)
            if node.op == "call_module":
                call: Callable[..., Any] = call_norm if node in self.normalized else call_module
                by_events = EVENTS.of(node)
                if node in self.norms:
                    call = call_normed_layer_by_events if by_events else call_layer
                    args = (self.modules[str(self.norms[node].target)], *args)
                elif by_events:
                    call = call_layer_by_events
                args = (self.modules[str(node.target)], *args)
                new = self.graph.create_node("call_function", call, args, dict(kwargs), name=node.name)
            elif SPIKES.of(node):
                args = (*args, SPIKES.of(node), SITE.of(node))
                new = self.graph.create_node("call_function", matmul_by_events, args, {}, name=node.name)
            elif EVENTS.of(node):
                call = FUNCTIONS[node.target]  # type: ignore[index]
                new = self.graph.create_node("call_function", call, args, dict(kwargs), name=node.name)
            else:
                new = self.graph.create_node(node.op, node.target, args, dict(kwargs), name=node.name)
            new.meta.update({k: v for k, v in node.meta.items() if k in ("where", "module", "val")})
            self.env[node] = new
        self.open.discard(node)


def _least_images(convolution: Node, image: Node) -> int:
    """The fewest elements of the images that are converted to channels-last; 0: all are.

    A convolution between row-major values pays for two conversions, other values are channels-last anyway.
    """
    if any("channels_last" in n.meta and n.op != "output" for n in (image, *convolution.users)):
        return 0
    before, after = image.meta.get("val"), convolution.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)) or before.dim() != 4 or not before.numel():
        return 0
    return min(_SMALL, _SMALL * before.numel() // max(after.numel(), 1))


def is_batch_first(initial: Any) -> bool:
    """Whether the initial value of a slot is known to have the batch in dimension 0."""
    return isinstance(initial, Node) and BATCH_DIM.of(initial) == 0


def same_for_all_samples(node: Node) -> bool:
    """Whether a folded node has no batch dimension because it depends only on sizes: `torch.arange(x.shape[1])`."""
    is_fold = KIND.of(node) == "fold" and not FOLDS_DIM_0.is_known(node)
    return is_fold and BATCH_DIM.of(node) is None
