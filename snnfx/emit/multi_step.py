"""Emit the multi-step graph: one call of a `snnfx.functional` function for each region of a partitioned program.

Two graphs share the region modules. The graph of this module takes sequences with time first, the state by slot name
(None: the reset state) and `time`, a tensor `[T]` for regions without sequence inputs; it returns outputs, final state
and recorded values. The plain graph (`snnfx.emit.plain_graph`) has no state; users see and export it. Regions take
modules and parameters as arguments, so that these stay where the model has them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.analysis.first_step_match import match_first_step
from snnfx.analysis.foldable_loops import folds_when_cut, is_trace_loop
from snnfx.analysis.statistic_reads import is_statistic_read
from snnfx.emit.emitter import Emitted, Emitter, TargetName
from snnfx.emit.region_builder import RegionBuilder, is_batch_first, same_for_all_samples
from snnfx.emit.shape_dependence import unexpanded_dimensions
from snnfx.functional import map_forward, multi_step_forward, seq_to_ann_forward
from snnfx.ir.facts import BATCH_DIM, FOLDS_DIM_0, LOOP_EVENTS, REFUSAL, SLOT, STEP_NODE, SUNK
from snnfx.ir.printing import describe_node
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.sequence_functions import (
    call_once,
    delay_one_step,
    hold_over_time,
    multiply_by_time_steps,
    reduce_over_time,
    repeat_over_time,
)
from snnfx.ops.statistics import read_statistic
from snnfx.ops.step_batch_norm import batch_norm_per_step
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.region_modules import LoopRegion, MapRegion, PeeledLoopRegion
from snnfx.regions.sequence_region import RegionGraph
from snnfx.regions.truncated_loop import CutLoopRegion, TraceRegion

__all__ = ["MultiStepEmitter", "emit_multi_step"]


def emit_multi_step(
    program: StepProgram,
    container: str,
    target_name: TargetName,
    record: Sequence[Node] = (),
    reduce: str | None = None,
) -> Emitted:
    """Emit a partitioned program for whole sequences, with state.

    Args:
        program: a program at stage "partitioned".
        container: the attribute path under which the net stores the region modules.
        target_name: maps a target of the program to an attribute path on the net.
        record: nodes whose values over time the graph returns as well.
        reduce: return the "mean", "sum" or "last" over time of the outputs instead of sequences.

    Returns:
        A graph `(inputs..., state=None, time=None) -> (outputs, {slot: final value}, records)`.
    """
    return MultiStepEmitter(program, container, target_name, record, reduce).emit()


class MultiStepEmitter(Emitter):
    """Emits the graph with state, region by region; the plain graph differs in its inputs and outputs."""

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
        match = match_first_step(program)
        self.first_steps = {} if match is None else match.loops
        self.builders = {region.name: self._builder(region) for region in program.regions}
        self.read_outside = self._nodes_read_outside()

    def _builder(self, region: Region) -> RegionBuilder:
        # A loop whose state edges were all cut is folded over time.
        folds = folds_when_cut(self.program, region) or None
        builder = RegionBuilder(self.program, region.nodes, region.slots, folds=folds)
        if region.name in self.first_steps:
            builder.add_first_step(self.first_steps[region.name])
        elif region.kind == "loop":
            builder.add_initial_values(region.slots)
        return builder

    def emit(self) -> Emitted:
        self.placeholders()
        for region in self.program.regions:
            self.emit_region(region)
        outputs = [self.in_caller_layout(value, self.returned(value)) for value in self.program.outputs]
        returned_slots = {name for argument in self.program.carried for name in argument.slot_names()}
        state = {slot.name: self.final_state(slot.name) for slot in self.program.slots}
        for name in sorted(returned_slots & state.keys()):
            state[name] = self.in_caller_layout(self.next_of[name], state[name])
        return self.finish(outputs, state, [self._as_sequence(node) for node in self.record])

    def emit_region(self, region: Region) -> None:
        """Add the call of a region and define its values that are read outside it."""
        if is_statistic_read(region.nodes[0]) and region.kind == "once":
            self._emit_read(region.nodes[0])
            return
        builder = self.builders[region.name]
        output_nodes = [node for node in region.nodes if node in self.read_outside]
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
            module = self.region(region.name, lambda: builder.graph_module(output_nodes))
            constant_args += tuple(self._reduced_operand(node) for node in builder.inputs)
            call = self.graph.call_function(call_once, (module, constant_args), name=region.name)
        elif region.kind == "fold":
            call = self._emit_fold(region, builder, output_nodes, constant_args)
        elif region.kind == "map":
            call = self._emit_sequence_call(
                region,
                builder,
                lambda: MapRegion(_label(region), builder.graph_module(output_nodes, extra_input=not builder.inputs)),
                map_forward,
                output_nodes,
                constant_args,
                {},
            )
        else:
            self._emit_loop(region, builder, output_nodes, constant_args)
            return
        for index, node in enumerate(output_nodes):
            value = self.graph.call_function(operator.getitem, (call, index))
            if region.kind == "fold" and same_for_all_samples(node):
                value = self.graph.call_method("select", (value, 1, 0))
            self._define(node, value)

    def _emit_read(self, node: Node) -> None:
        """Read a statistic before or after the call that updates it for the whole sequence."""
        module, name, *after = node.args
        arguments = (self.attribute(str(module.target)), name, *(self.value(n) for n in after))  # type: ignore[union-attr, arg-type]
        self._define(node, self.graph.call_function(read_statistic, arguments))

    def _emit_fold(self, region: Region, builder: RegionBuilder, output_nodes: list[Node], constants: Any) -> Node:
        module = self.region(region.name, lambda: builder.graph_module(output_nodes))
        inputs = tuple(self._sequence_input(node) for node in builder.inputs)
        kwargs: dict[str, Any] = {"constants": constants} if constants else {}
        if FOLDS_DIM_0.is_known(region.nodes[0]):
            return self.graph.call_function(seq_to_ann_forward, (inputs, module), kwargs, name=region.name)
        batch_dims = tuple(BATCH_DIM.of(node) for node in builder.inputs)
        if any(batch_dims):
            kwargs["batch_dim"] = batch_dims
        out_dims = tuple(0 if same_for_all_samples(node) else BATCH_DIM.of(node) for node in output_nodes)
        if any(out_dims):
            kwargs["out_batch_dim"] = out_dims
        return self.graph.call_function(seq_to_ann_forward, (inputs, module), kwargs, name=region.name)

    def _emit_sequence_call(
        self,
        region: Region,
        builder: RegionBuilder,
        make: Callable[[], LoopRegion | MapRegion],
        function: Callable[..., Any],
        output_nodes: list[Node],
        constants: Any,
        kwargs: dict[str, Any],
    ) -> Node:
        def make_bound() -> nn.Module:
            module = make()
            targets = [_module_target(self.program, key) for key in builder.constants]
            module.bind(self.program.resolve, targets, output_count=len(output_nodes))
            module.slot_count = len(region.slots)
            if isinstance(module, LoopRegion):
                next_states = [self.next_of[slot] for slot in region.slots]
                make_start = functools.partial(self._start_of_loop, region, builder, next_states)
                is_peeled = isinstance(module, PeeledLoopRegion)
                module.make_start = make_start if region.slots and not is_peeled else None
                if region.lowering_refusal == "":
                    module.kernels = RegionKernels(
                        module.label,
                        module.step,
                        None if is_peeled else module.first,  # the kernels run the later steps
                        make_start,
                        by_events=any(LOOP_EVENTS.of(node) for node in region.nodes),
                    )
            return module

        inputs = tuple(self._sequence_input(node) for node in builder.inputs) or (self.steps(),)
        if constants:
            kwargs = {**kwargs, "constants": constants}
        attribute = self.region(region.name, make_bound)
        return self.graph.create_node("call_function", function, (inputs, attribute), kwargs, name=region.name)

    def _emit_loop(self, region: Region, builder: RegionBuilder, output_nodes: list[Node], constants: Any) -> None:
        next_states = [self.next_of[slot] for slot in region.slots]
        extra = not builder.inputs

        def make() -> LoopRegion:
            step = builder.graph_module(output_nodes, next_states, region.slots, extra_input=extra)
            if not region.slots:
                return LoopRegion(_label(region), step, None)
            if region.name in self.first_steps:
                assert self.program.first_step is not None
                peeled = self.first_steps[region.name]
                first = builder.first_step_graph(self.program.first_step, peeled, output_nodes, region.slots)
                return PeeledLoopRegion(_label(region), step, first)
            first = builder.graph_module(output_nodes, next_states, region.slots, first=True, extra_input=extra)
            if is_trace_loop(region):
                leak = region.nodes[-1].args[2]
                return TraceRegion(_label(region), step, first, None if isinstance(leak, Node) else leak)  # type: ignore[arg-type]
            if extra or not folds_when_cut(self.program, region, builder.inputs):
                return LoopRegion(_label(region), step, first)
            return self._cut_loop(region, builder, step, first, output_nodes, next_states)

        state: Any = self.state_of(region.slots) if region.slots else ()
        call = self._emit_sequence_call(
            region, builder, make, multi_step_forward, output_nodes, constants, {"state": state}
        )
        outputs = self.graph.call_function(operator.getitem, (call, 0))
        for index, node in enumerate(output_nodes):
            self._define(node, self.graph.call_function(operator.getitem, (outputs, index)))
        self.loop_calls.update({slot: (call, index) for index, slot in enumerate(region.slots)})

    def _start_of_loop(self, region: Region, builder: RegionBuilder, next_states: list[Any]) -> RegionGraph:
        """`(*constants, *inputs) -> (states before the first step, states after it)`, from the reset state."""
        by_slot = {SLOT.of(node): node for node in self.program.slot_nodes()}
        slots = [by_slot[slot] for slot in region.slots]
        return builder.graph_module(slots, next_states, region.slots, first=True, extra_input=not builder.inputs)

    def _cut_loop(
        self,
        region: Region,
        builder: RegionBuilder,
        step: RegionGraph,
        first: RegionGraph,
        output_nodes: list[Node],
        next_states: list[Any],
    ) -> CutLoopRegion:
        by_slot = {SLOT.of(node): node for node in self.program.slot_nodes()}
        slots = [by_slot[slot] for slot in region.slots]
        return CutLoopRegion(
            _label(region),
            step,
            first,
            start=self._start_of_loop(region, builder, next_states),
            advance=builder.graph_module((), next_states, region.slots).without_dead_code(),
            outputs=builder.graph_module(output_nodes, (), region.slots).without_dead_code(),
            input_dims=[BATCH_DIM.of(node) for node in builder.inputs],
            state_dims=[BATCH_DIM.of(node) for node in slots],
            output_dims=[BATCH_DIM.of(node) for node in output_nodes],
        )

    def _nodes_read_outside(self) -> set[Node]:
        """The nodes that are read outside their region. Sizes are excluded: each region computes the sizes it reads."""
        needed = {v for v in (*self.program.outputs, *self.record) if isinstance(v, Node)}
        loop_slots = {slot for region in self.program.regions for slot in region.slots}
        for slot in self.program.slots:
            if slot.name not in loop_slots:
                next_state = self.next_of[slot.name]
                needed.update([next_state] if isinstance(next_state, Node) else [])
                needed.update(_main_operands(self.program, self.initial_of[slot.name], self.region_of))
        for builder in self.builders.values():
            needed.update(builder.inputs)
            needed.update(key for key in builder.constants if isinstance(key, Node))
        return needed

    def _define(self, node: Node, value: Node) -> None:
        value.meta.update({k: v for k, v in node.meta.items() if k in ("where", "module", "val", "region", "varying")})
        STEP_NODE.set(value, node.name)
        self.values[node] = value

    def value(self, node: Node) -> Node:
        """The emitted node with the sequence, or the invariant value, of a node of the program."""
        if node not in self.values:
            if node.op == "get_attr":
                return self.attribute(str(node.target))
            if node.op == "placeholder" and SLOT.is_known(node):
                self.values[node] = self._delayed(node)
            else:
                raise AssertionError(f"{node} is read before its region runs")
        return self.values[node]

    def _constant(self, key: Node | str) -> Node:
        return self.attribute(key) if isinstance(key, str) else self.value(key)

    def returned(self, value: Any) -> Any:
        """An output: a sequence, or its reduction over time."""
        if self.reduce is None or not isinstance(value, Node):
            return self._as_sequence(value)
        if SUNK.of(value):
            return self._reduced_sum(self.value(value)) if self.reduce == "sum" else self.value(value)
        if not value.meta.get("varying"):
            return self._reduced_sum(self.value(value)) if self.reduce == "sum" else self.value(value)
        return self.graph.call_function(reduce_over_time, (self._as_sequence(value), self.reduce))

    def _reduced_sum(self, mean: Node) -> Node:
        """The sum over time as T times the mean, so that a sunk bias counts once per time step."""
        return self.graph.call_function(multiply_by_time_steps, (mean, self.steps()))

    def _reduced_operand(self, node: Node) -> Node:
        """The operand of a sunk node: the mean, or the last value, over time of a sequence."""
        if node not in self.reduced:
            how = "last" if self.reduce == "last" else "mean"
            self.reduced[node] = self.graph.call_function(reduce_over_time, (self._as_sequence(node), how))
        return self.reduced[node]

    def _sequence_input(self, node: Node) -> Node:
        return self._as_sequence(node)  # type: ignore[no-any-return]

    def _as_sequence(self, value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        if value.meta.get("varying") or (value.op == "placeholder" and SLOT.is_known(value)):
            return self.value(value)
        return self.graph.call_function(repeat_over_time, (self.value(value), self.steps()))

    def _delayed(self, placeholder: Node) -> Node:
        """The sequence of a slot that is on no cycle: its next value, delayed by one time step."""
        slot = SLOT.of(placeholder)
        next_state = self.next_of[slot]
        state = self.state_of((slot,))
        initial = self.initial_of[slot]
        has_batch = is_batch_first(initial)
        is_constant = next_state is placeholder
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
        if is_constant:
            return self.graph.call_function(hold_over_time, (state, initial, self.steps()))
        unexpanded = unexpanded_dimensions(self.program, placeholder, self.initial_of[slot])
        arguments = (self._as_sequence(next_state), state, initial, self.steps(), slot, has_batch, unexpanded)
        return self.graph.call_function(delay_one_step, arguments)

    def final_state(self, slot: str) -> Any:
        """The value of a slot after the last step."""
        if slot in self.loop_calls:
            call, index = self.loop_calls[slot]
            finals = self.graph.call_function(operator.getitem, (call, 1))
            return self.graph.call_function(operator.getitem, (finals, index))
        next_state = self.next_of[slot]
        if not isinstance(next_state, Node):
            return next_state
        return self.graph.call_function(operator.getitem, (self._as_sequence(next_state), -1))


def _main_operands(program: StepProgram, value: Any, stop: Iterable[Node]) -> list[Node]:
    if not isinstance(value, Node):
        return []
    builder = RegionBuilder(program, [], [], stop=stop)
    builder.add_values([value])
    return [*builder.inputs, *(key for key in builder.constants if isinstance(key, Node))]


def _is_per_step_batch_norm(region: Region) -> bool:
    refusal = REFUSAL.of(region.nodes[0])
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
