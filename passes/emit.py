"""Emit the multi-step graph: one call of a `snnfx.functional` function for each region of a partitioned program.

There are two forms over the same region modules. The plain one is what a user sees and exports: from the sequences
of the model's inputs to its outputs, starting from the reset state. The one with state takes sequences with time first,
the state by slot name (None: the reset state) and `time`, a tensor `[T]` for regions that have no sequence; it returns
outputs, final state and what is recorded. Regions take modules and parameters as arguments, so that every one of them
stays where the model has it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from snnfx.errors import CaptureError
from snnfx.functional import map_forward, multi_step_forward, seq_to_ann_forward
from snnfx.passes.dependence import is_size
from snnfx.program import Region, StepProgram, add_placeholder, describe_node, place_of
from snnfx.regions import (
    LoopRegion,
    MapRegion,
    RegionGraph,
    batch_norm_per_step,
    call_module,
    call_once,
    delay_one_step,
    in_shape_of,
    pick_state,
    reduce_over_time,
    repeat_for_samples,
    repeat_over_time,
    time_steps,
    times_steps,
)

__all__ = ["Emitted", "RegionBuilder", "emit_multi_step", "emit_plain", "emit_single_step", "whole_step"]

TargetName = Callable[[str], str]


@dataclass
class Emitted:
    """An emitted graph and the region modules that it refers to as ``<container>.<region name>``."""

    graph: fx.Graph
    regions: dict[str, nn.Module] = field(default_factory=dict)


def emit_multi_step(
    program: StepProgram,
    container: str,
    target_name: TargetName,
    record: Sequence[Node] = (),
    reduce: str | None = None,
) -> Emitted:
    """Emit a partitioned program for whole sequences, with state.

    Args:
        program: at stage "partitioned".
        container: where the net will keep the region modules.
        target_name: from a target of the program to the attribute path on the net.
        record: nodes whose values over time are wanted as well.
        reduce: return the outputs' "mean", "sum" or "last" over time instead of sequences.

    Returns:
        A graph `(inputs..., state=None, time=None) -> (outputs, {slot: final value}, records)`.
    """
    return _MultiStepEmitter(program, container, target_name, record, reduce).emit()


def emit_plain(
    program: StepProgram,
    container: str,
    target_name: TargetName,
    regions: dict[str, nn.Module],
    time_dims: Sequence[int | None],
    output_time_dim: int,
    reduce: str | None = None,
) -> Emitted:
    """Emit a partitioned program for whole sequences from the reset state: `(inputs...) -> outputs`.

    Args:
        program: at stage "partitioned".
        container: where the net keeps the region modules.
        target_name: from a target of the program to the attribute path on the net.
        regions: the region modules of `emit_multi_step`, used again.
        time_dims: where T is in each tensor input, None for one that is the same at every step.
        output_time_dim: where T is in the outputs.
        reduce: as for `emit_multi_step`.
    """
    return _PlainEmitter(program, container, target_name, regions, time_dims, output_time_dim, reduce).emit()


def emit_single_step(program: StepProgram, container: str, target_name: TargetName) -> Emitted:
    """Emit a program for one step: `(inputs..., state=None) -> (outputs, {slot: next value}, ())`."""
    return _SingleStepEmitter(program, container, target_name).emit()


class _Emitter:
    """What both forms share: placeholders, attributes, and the state as a dict."""

    def __init__(self, program: StepProgram, container: str, target_name: TargetName) -> None:
        self.program, self.container, self.target_name = program, container, target_name
        self.graph = fx.Graph()
        self.regions: dict[str, nn.Module] = {}
        self.attributes: dict[str, Node] = {}
        self.values: dict[Node, Node] = {}

    def placeholders(self) -> None:
        for node in self.program.input_nodes():
            self.values[node] = add_placeholder(self.graph, node.name)
            self.values[node].meta.update(node.meta)
        self.state = add_placeholder(self.graph, "state", default_value=None)
        self.time = add_placeholder(self.graph, "time", default_value=None)

    def attribute(self, target: str) -> Node:
        """A get_attr node of the net for a target of the program."""
        if target not in self.attributes:
            self.attributes[target] = self.graph.get_attr(self.target_name(target))
        return self.attributes[target]

    def steps(self) -> Node:
        """A tensor `[T]`."""
        return self.time

    def region(self, name: str, make: Callable[[], nn.Module]) -> Node:
        """A get_attr node of the net for a region module, made unless the other form has it already."""
        if name not in self.regions:
            self.regions[name] = make()
        return self.graph.get_attr(f"{self.container}.{name}")

    def state_of(self, slots: Sequence[str]) -> Any:
        """The values of some slots before the first step; None is the reset state."""
        return self.graph.call_function(pick_state, (self.state, tuple(slots)))

    def finish(self, outputs: Any, state: dict[str, Any], records: Any = ()) -> Emitted:
        self.graph.output((tuple(outputs), state, tuple(records)))
        return Emitted(self.graph, self.regions)


class _MultiStepEmitter(_Emitter):
    def __init__(
        self,
        program: StepProgram,
        container: str,
        target_name: TargetName,
        record: Sequence[Node],
        reduce: str | None,
    ) -> None:
        super().__init__(program, container, target_name)
        self.record, self.reduce = record, reduce
        self.region_of = {node: region for region in program.regions for node in region.nodes}
        self.next_of = dict(zip((s.name for s in program.slots), program.next_states, strict=True))
        self.initial_of = dict(zip((s.name for s in program.slots), program.initial_values, strict=True))
        self.loop_calls: dict[str, tuple[Node, int]] = {}
        self.reduced: dict[Node, Node] = {}
        self.builders = {region.name: self._builder(region) for region in program.regions}
        self.read_outside = self._read_outside()

    def _builder(self, region: Region) -> RegionBuilder:
        builder = RegionBuilder(self.program, region.nodes, region.slots)
        if region.kind == "loop":
            builder.add_initial_values(region.slots)
        return builder

    def emit(self) -> Emitted:
        self.placeholders()
        for region in self.program.regions:
            self._emit_region(region)
        outputs = [self._output(value) for value in self.program.outputs]
        state = {slot.name: self._final_state(slot.name) for slot in self.program.slots}
        return self.finish(outputs, state, [self._as_sequence(node) for node in self.record])

    def _emit_region(self, region: Region) -> None:
        builder = self.builders[region.name]
        wanted = [node for node in region.nodes if node in self.read_outside]
        constants = builder.constants
        is_batch_norm = region.kind == "map" and _is_per_step_batch_norm(region)
        if is_batch_norm:
            node = region.nodes[0]
            call = self.graph.call_function(
                batch_norm_per_step, (self._as_sequence(node.args[0]), self.attribute(str(node.target)))
            )
            self._define(node, call)
            return
        constant_args = tuple(self._constant(key) for key in constants)
        if region.kind == "once":
            module = self.region(region.name, lambda: builder.graph_module(wanted))
            constant_args += tuple(self._reduced_operand(node) for node in builder.inputs)
            call = self.graph.call_function(call_once, (module, constant_args), name=region.name)
        elif region.kind == "fold":
            call = self._emit_fold(region, builder, wanted, constant_args)
        elif region.kind == "map":
            call = self._emit_sequence_call(
                region,
                builder,
                lambda: MapRegion(_label(region), builder.graph_module(wanted, extra_input=not builder.inputs)),
                map_forward,
                wanted,
                constant_args,
                {},
            )
        else:
            self._emit_loop(region, builder, wanted, constant_args)
            return
        for index, node in enumerate(wanted):
            value = self.graph.call_function(operator.getitem, (call, index))
            if region.kind == "fold" and _same_for_all_samples(node):
                value = self.graph.call_method("select", (value, 1, 0))
            self._define(node, value)

    def _emit_fold(self, region: Region, builder: RegionBuilder, wanted: list[Node], constants: Any) -> Node:
        module = self.region(region.name, lambda: builder.graph_module(wanted))
        inputs = tuple(self._sequence_input(node) for node in builder.inputs)
        kwargs: dict[str, Any] = {"constants": constants} if constants else {}
        batch_dims = tuple(node.meta["batch_dim"] for node in builder.inputs)
        if any(batch_dims):
            kwargs["batch_dim"] = batch_dims
        out_dims = tuple(0 if _same_for_all_samples(node) else node.meta["batch_dim"] for node in wanted)
        if any(out_dims):
            kwargs["out_batch_dim"] = out_dims
        return self.graph.call_function(seq_to_ann_forward, (inputs, module), kwargs, name=region.name)

    def _emit_sequence_call(
        self,
        region: Region,
        builder: RegionBuilder,
        make: Callable[[], LoopRegion | MapRegion],
        function: Callable[..., Any],
        wanted: list[Node],
        constants: Any,
        kwargs: dict[str, Any],
    ) -> Node:
        def make_bound() -> nn.Module:
            module = make()
            targets = [_module_target(self.program, key) for key in builder.constants]
            module.bind(self.program.resolve, targets, output_count=len(wanted))
            return module

        inputs = tuple(self._sequence_input(node) for node in builder.inputs) or (self.steps(),)
        if constants:
            kwargs = {**kwargs, "constants": constants}
        attribute = self.region(region.name, make_bound)
        return self.graph.create_node("call_function", function, (inputs, attribute), kwargs, name=region.name)

    def _emit_loop(self, region: Region, builder: RegionBuilder, wanted: list[Node], constants: Any) -> None:
        nexts = [self.next_of[slot] for slot in region.slots]
        extra = not builder.inputs

        def make() -> LoopRegion:
            step = builder.graph_module(wanted, nexts, region.slots, extra_input=extra)
            if not region.slots:
                return LoopRegion(_label(region), step, None)
            first = builder.graph_module(wanted, nexts, region.slots, first=True, extra_input=extra)
            return LoopRegion(_label(region), step, first)

        state: Any = self.state_of(region.slots) if region.slots else ()
        call = self._emit_sequence_call(region, builder, make, multi_step_forward, wanted, constants, {"state": state})
        outputs = self.graph.call_function(operator.getitem, (call, 0))
        for index, node in enumerate(wanted):
            self._define(node, self.graph.call_function(operator.getitem, (outputs, index)))
        self.loop_calls.update({slot: (call, index) for index, slot in enumerate(region.slots)})

    def _read_outside(self) -> set[Node]:
        """The nodes that somebody outside of their region reads (sizes are computed again there)."""
        needed = {v for v in (*self.program.outputs, *self.record) if isinstance(v, Node)}
        looped = {slot for region in self.program.regions for slot in region.slots}
        for slot in self.program.slots:
            if slot.name not in looped:
                following = self.next_of[slot.name]
                needed.update([following] if isinstance(following, Node) else [])
                needed.update(_main_operands(self.program, self.initial_of[slot.name], self.region_of))
        for builder in self.builders.values():
            needed.update(builder.inputs)
            needed.update(key for key in builder.constants if isinstance(key, Node))
        return needed

    def _define(self, node: Node, value: Node) -> None:
        value.meta.update({k: v for k, v in node.meta.items() if k in ("where", "module", "val", "region", "varying")})
        self.values[node] = value

    def value(self, node: Node) -> Node:
        """The sequence (or the invariant value) of a node of the program in the emitted graph."""
        if node not in self.values:
            if node.op == "get_attr":
                return self.attribute(str(node.target))
            if node.op == "placeholder" and "slot" in node.meta:
                self.values[node] = self._delayed(node)
            else:
                raise AssertionError(f"{node} is used before its region")
        return self.values[node]

    def _constant(self, key: Node | str) -> Node:
        return self.attribute(key) if isinstance(key, str) else self.value(key)

    def _output(self, value: Any) -> Any:
        """A sequence, or its reduction over time."""
        if self.reduce is None or not isinstance(value, Node):
            return self._as_sequence(value)
        if value.meta.get("sunk"):
            return self._reduced_sum(self.value(value)) if self.reduce == "sum" else self.value(value)
        if not value.meta.get("varying"):
            return self._reduced_sum(self.value(value)) if self.reduce == "sum" else self.value(value)
        return self.graph.call_function(reduce_over_time, (self._as_sequence(value), self.reduce))

    def _reduced_sum(self, mean: Node) -> Node:
        """A sum over time is T times the mean: a sunk bias is added once for each step, too."""
        return self.graph.call_function(times_steps, (mean, self.steps()))

    def _reduced_operand(self, node: Node) -> Node:
        """What a sunk node is given: the mean (or last) over time of a sequence."""
        if node not in self.reduced:
            how = "last" if self.reduce == "last" else "mean"
            self.reduced[node] = self.graph.call_function(reduce_over_time, (self._as_sequence(node), how))
        return self.reduced[node]

    def _sequence_input(self, node: Node) -> Node:
        return self._as_sequence(node)  # type: ignore[no-any-return]

    def _as_sequence(self, value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        if value.meta.get("varying") or (value.op == "placeholder" and "slot" in value.meta):
            return self.value(value)
        return self.graph.call_function(repeat_over_time, (self.value(value), self.steps()))

    def _delayed(self, placeholder: Node) -> Node:
        """A slot that is on no cycle: the sequence of its next value, one step later."""
        slot = placeholder.meta["slot"]
        following = self.next_of[slot]
        state = self.state_of((slot,))
        initial = self.initial_of[slot]
        if isinstance(initial, Node):
            builder = RegionBuilder(self.program, [], [], stop=self.region_of)
            builder.add_values([initial])
            value = initial
            module = self.region(f"initial_{placeholder.name}", lambda: builder.graph_module([value]))
            constants = tuple(self._constant(key) for key in builder.constants)
            first = tuple(
                self.graph.call_function(operator.getitem, (self._sequence_input(n), 0)) for n in builder.inputs
            )
            values = self.graph.call_function(call_once, (module, (*constants, *first)))
            initial = self.graph.call_function(operator.getitem, (values, 0))
        return self.graph.call_function(delay_one_step, (self._as_sequence(following), state, initial, self.steps()))

    def _final_state(self, slot: str) -> Any:
        if slot in self.loop_calls:
            call, index = self.loop_calls[slot]
            finals = self.graph.call_function(operator.getitem, (call, 1))
            return self.graph.call_function(operator.getitem, (finals, index))
        following = self.next_of[slot]
        if not isinstance(following, Node):
            return following
        return self.graph.call_function(operator.getitem, (self._as_sequence(following), -1))


class _PlainEmitter(_MultiStepEmitter):
    """The form without state: what is read at the start is the reset state, final states are not returned."""

    def __init__(
        self,
        program: StepProgram,
        container: str,
        target_name: TargetName,
        regions: dict[str, nn.Module],
        time_dims: Sequence[int | None],
        output_time_dim: int,
        reduce: str | None,
    ) -> None:
        super().__init__(program, container, target_name, (), reduce)
        self.regions.update(regions)
        self.time_dims, self.output_time_dim = time_dims, output_time_dim

    def placeholders(self) -> None:
        inputs = self.program.input_nodes()
        for node in inputs:
            self.values[node] = add_placeholder(self.graph, node.name)
        carriers = [n for n, dim in zip(inputs, self.time_dims, strict=True) if dim is not None]
        self.time = None if carriers else add_placeholder(self.graph, "time")  # type: ignore[assignment]
        for node, dim in zip(inputs, self.time_dims, strict=True):
            if dim:
                self.values[node] = self.graph.call_method("movedim", (self.values[node], dim, 0))
            self.values[node].meta.update(node.meta)
        self.first_carrier = carriers[0] if carriers else None

    def state_of(self, slots: Sequence[str]) -> Any:
        return None

    def steps(self) -> Node:
        if self.time is None:
            assert self.first_carrier is not None
            self.time = self.graph.call_function(time_steps, (self.values[self.first_carrier],))
        return self.time

    def emit(self) -> Emitted:
        self.placeholders()
        for region in self.program.regions:
            self._emit_region(region)
        outputs = [self._time_back(self._output(value)) for value in self.program.outputs]
        self.graph.output(pytree.tree_unflatten(outputs, self.program.output_spec))
        return Emitted(self.graph, self.regions)

    def _time_back(self, value: Any) -> Any:
        if isinstance(value, Node) and self.output_time_dim != 0 and self.reduce is None:
            return self.graph.call_method("movedim", (value, 0, self.output_time_dim))
        return value


class _SingleStepEmitter(_Emitter):
    def emit(self) -> Emitted:
        self.placeholders()
        program = self.program
        slots = [slot.name for slot in program.slots]
        builder = whole_step(program)
        wanted = [n for n in program.outputs if isinstance(n, Node)]

        def make() -> LoopRegion:
            step = builder.graph_module(wanted, program.next_states, slots)
            return LoopRegion("step", step, builder.graph_module(wanted, program.next_states, slots, first=True))

        module = self.region("step", make)
        arguments = [self.attribute(key) if isinstance(key, str) else self._given(key) for key in builder.constants]
        arguments += [self.values[node] for node in builder.inputs]
        state = self.state_of(slots)
        call = self.graph.call_function(call_module, (module, *arguments, state), name="step")
        outputs = self.graph.call_function(operator.getitem, (call, 0))
        nexts = self.graph.call_function(operator.getitem, (call, 1))
        values = [
            self.graph.call_function(operator.getitem, (outputs, wanted.index(v))) if isinstance(v, Node) else v
            for v in program.outputs
        ]
        following = {
            slot: self.graph.call_function(operator.getitem, (nexts, index)) for index, slot in enumerate(slots)
        }
        return self.finish(values, following)

    def _given(self, node: Node) -> Node:
        return self.values[node] if node in self.values else self.attribute(str(node.target))


class RegionBuilder:
    """Builds the graphs of one region out of nodes of the step graph.

    Args:
        program: the program of the nodes.
        nodes: what the region computes, in program order.
        slots: names of the slots whose state it carries.
        stop: nodes at which `add_values` stops because they are computed elsewhere (default: nodes not in `nodes`).
    """

    def __init__(
        self, program: StepProgram, nodes: Sequence[Node], slots: Sequence[str], stop: Iterable[Node] | None = None
    ) -> None:
        self.program, self.slots = program, slots
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
        """The values from outside that vary in time."""
        return list(self.input_nodes)

    def add_initial_values(self, slots: Sequence[str]) -> None:
        """Take what the initial values of the slots need as inputs too."""
        by_slot = dict(zip((s.name for s in self.program.slots), self.program.initial_values, strict=True))
        main = {n for r in self.program.regions for n in r.nodes} or set(self.inside)
        self.stop |= main
        self.add_values([by_slot[slot] for slot in slots])

    def add_values(self, values: Iterable[Any]) -> None:
        """Compute further nodes in the region, down to nodes of the step proper."""
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
        if operand in self.inside or (operand.op == "placeholder" and operand.meta.get("slot") in self.slots):
            return
        if is_size(operand):
            self._need_operands(operand)
        elif operand.op == "get_attr" or not (operand.meta.get("varying", True)):
            # An invariant value that has a batch is repeated for a fold: see `graph_module`.
            if operand.op != "get_attr" and self._folds() and operand.meta.get("batch_dim") is not None:
                self.input_nodes[operand] = None
            else:
                self.constants[operand] = None
        else:
            self.input_nodes[operand] = None

    def _folds(self) -> bool:
        return any(node.meta.get("kind") == "fold" for node in self.inside)

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
            outputs: nodes whose values are returned, as a tuple.
            next_states: what the slots become; then the state is the last argument.
            slots: the slots, in the order of the state tuple.
            first: build the step from the reset state: no state argument, slots are their initial values.
            extra_input: take an input that is not used (a loop over nothing but constants).
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
        if extra_input:
            add_placeholder(graph, "time")
        # In a peeled first step, a slot that is traced through is not read: its first value is written into the graph.
        by_name = self.program.nodes_by_name
        readers = {s.name: by_name[s.placeholder] for s in self.program.slots if s.placeholder in by_name}
        slot_nodes = {name: node for name, node in readers.items() if name in slots}
        if next_states is not None and not first:
            state = add_placeholder(graph, "state")
            for index, slot in enumerate(slots):
                if slot in slot_nodes:
                    env[slot_nodes[slot]] = graph.call_function(operator.getitem, (state, index))
        builder = _Copier(graph, env, modules, self.program, slot_nodes if first else {})
        for node in self.inside:
            builder.copy(node)
        results = [builder.copy(node) for node in outputs]
        if first and next_states is not None:
            following = dict(zip(slots, next_states, strict=True))
            for index, node in enumerate(outputs):
                # A slot that is read outside of the loop: there it has the shape of the later steps.
                if node in builder.first_slots:
                    after = builder.argument(following[builder.first_slots[node]])
                    results[index] = graph.call_function(in_shape_of, (results[index], after))
        if next_states is None:
            dims = ((node, node.meta.get("batch_dim")) for node in self.input_nodes)
            samples = next(((env[node], dim) for node, dim in dims if isinstance(dim, int)), None)
            for index, node in enumerate(outputs):
                if samples is not None and _same_for_all_samples(node):
                    results[index] = graph.call_function(repeat_for_samples, (results[index], *samples))
            graph.output(tuple(results))
        else:
            graph.output((tuple(results), tuple(builder.argument(value) for value in next_states)))
        return RegionGraph(nn.Module(), graph, class_name="RegionGraph")


def whole_step(program: StepProgram) -> RegionBuilder:
    """A builder of the whole program as one region, with all its state."""
    nodes = [n for n in program.graph.nodes if n.op.startswith("call") or "slot" in n.meta]
    builder = RegionBuilder(program, nodes, [slot.name for slot in program.slots])
    builder.add_values([*program.outputs, *program.next_states, *program.initial_values])
    return builder


class _Copier:
    """Copies nodes into a region graph on demand; in a first step, slots turn into their initial values."""

    def __init__(
        self,
        graph: fx.Graph,
        env: dict[Node, Any],
        modules: dict[str, Node],
        program: StepProgram,
        first_slots: dict[str, Node],
    ) -> None:
        self.graph, self.env, self.modules, self.program = graph, env, modules, program
        self.initial_of = dict(zip((s.name for s in program.slots), program.initial_values, strict=True))
        self.first_slots = {node: slot for slot, node in first_slots.items()}
        self.open: set[Node] = set()

    def argument(self, value: Any) -> Any:
        return map_arg(value, self.copy)

    def copy(self, node: Node) -> Any:
        if node in self.env:
            return self.env[node]
        if node in self.open:
            raise CaptureError(
                "SNNFX210",
                f"the initial value of `{node.name}` cannot be computed",
                where=place_of(node),
                why="it depends on a value that itself needs this state.",
                hint="Give register_memory a number or a tensor, or make the initial value depend on the input alone.",
            )
        self.open.add(node)
        if node in self.first_slots:
            self.env[node] = self.argument(self.initial_of[self.first_slots[node]])
        else:
            args, kwargs = self.argument(tuple(node.args)), self.argument(node.kwargs)
            if node.op == "call_module":
                args = (self.modules[str(node.target)], *args)
                new = self.graph.create_node("call_function", call_module, args, dict(kwargs), name=node.name)
            else:
                new = self.graph.create_node(node.op, node.target, args, dict(kwargs), name=node.name)
            new.meta.update({k: v for k, v in node.meta.items() if k in ("where", "module", "val")})
            self.env[node] = new
        self.open.discard(node)
        return self.env[node]


def _same_for_all_samples(node: Node) -> bool:
    """Whether a folded node gives a tensor without a batch: made of sizes, such as torch.arange(x.shape[1])."""
    return node.meta.get("kind") == "fold" and node.meta.get("batch_dim") is None


def _main_operands(program: StepProgram, value: Any, stop: Iterable[Node]) -> list[Node]:
    if not isinstance(value, Node):
        return []
    builder = RegionBuilder(program, [], [], stop=stop)
    builder.add_values([value])
    return [*builder.inputs, *(key for key in builder.constants if isinstance(key, Node))]


def _is_per_step_batch_norm(region: Region) -> bool:
    refusal = region.nodes[0].meta.get("refusal")
    return (
        len(region.nodes) == 1
        and region.nodes[0].op == "call_module"
        and refusal is not None
        and refusal.code == "SNNFX106"
    )


def _module_target(program: StepProgram, key: Node | str) -> str | None:
    """The target of a constant that is a module; None for a tensor."""
    if isinstance(key, str):
        return key
    if key.op == "get_attr" and isinstance(program.resolve(str(key.target)), nn.Module):
        return str(key.target)
    return None


def _label(region: Region) -> str:
    names = dict.fromkeys(describe_node(n) for n in region.nodes if n.op != "placeholder")
    return f"{region.name} ({', '.join(list(names)[:3])}{', ...' if len(names) > 3 else ''})"
