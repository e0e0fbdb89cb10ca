"""Emit the multi-step graph: one call of a `snnfx.functional` function for each region of a partitioned program.

There are two forms over the same region modules. This one, with state, takes sequences with time first, the state by
slot name (None: the reset state) and `time`, a tensor `[T]` for regions that have no sequence; it returns outputs,
final state and what is recorded. The plain one (`snnfx.emit.plain_graph`) is what a user sees and exports. Regions
take modules and parameters as arguments, so that every one of them stays where the model has it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.emit.emitter import Emitted, Emitter, TargetName
from snnfx.emit.region_builder import RegionBuilder, has_batch_in_front, same_for_all_samples
from snnfx.functional import map_forward, multi_step_forward, seq_to_ann_forward
from snnfx.ir.program import Region, StepProgram, describe_node
from snnfx.ops.sequence_functions import (
    call_once,
    delay_one_step,
    hold_over_time,
    reduce_over_time,
    repeat_over_time,
    times_steps,
)
from snnfx.ops.step_batch_norm import batch_norm_per_step
from snnfx.passes.cut_temporal_edges import folds_when_cut, is_trace_loop
from snnfx.regions.region_kernels import RegionKernels
from snnfx.regions.region_modules import LoopRegion, MapRegion, RegionGraph
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
        program: at stage "partitioned".
        container: where the net will keep the region modules.
        target_name: from a target of the program to the attribute path on the net.
        record: nodes whose values over time are wanted as well.
        reduce: return the outputs' "mean", "sum" or "last" over time instead of sequences.

    Returns:
        A graph `(inputs..., state=None, time=None) -> (outputs, {slot: final value}, records)`.
    """
    return MultiStepEmitter(program, container, target_name, record, reduce).emit()


class MultiStepEmitter(Emitter):
    """Emits the form with state, region by region; the plain form differs in its ends."""

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
        # A loop whose state is cut is folded over time after all.
        folds = folds_when_cut(self.program, region) or None
        builder = RegionBuilder(self.program, region.nodes, region.slots, folds=folds)
        if region.kind == "loop":
            builder.add_initial_values(region.slots)
        return builder

    def emit(self) -> Emitted:
        self.placeholders()
        for region in self.program.regions:
            self.emit_region(region)
        outputs = [self.in_caller_layout(value, self.returned(value)) for value in self.program.outputs]
        handed_out = {name for argument in self.program.carried for name in argument.slot_names()}
        state = {slot.name: self._final_state(slot.name) for slot in self.program.slots}
        for name in sorted(handed_out & state.keys()):
            state[name] = self.in_caller_layout(self.next_of[name], state[name])
        return self.finish(outputs, state, [self._as_sequence(node) for node in self.record])

    def emit_region(self, region: Region) -> None:
        """Add the call of a region and define what is read outside of it."""
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
            if region.kind == "fold" and same_for_all_samples(node):
                value = self.graph.call_method("select", (value, 1, 0))
            self._define(node, value)

    def _emit_fold(self, region: Region, builder: RegionBuilder, wanted: list[Node], constants: Any) -> Node:
        module = self.region(region.name, lambda: builder.graph_module(wanted))
        inputs = tuple(self._sequence_input(node) for node in builder.inputs)
        kwargs: dict[str, Any] = {"constants": constants} if constants else {}
        batch_dims = tuple(node.meta["batch_dim"] for node in builder.inputs)
        if any(batch_dims):
            kwargs["batch_dim"] = batch_dims
        out_dims = tuple(0 if same_for_all_samples(node) else node.meta["batch_dim"] for node in wanted)
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
            module.slot_count = len(region.slots)
            if region.lowering_refusal == "" and isinstance(module, LoopRegion):
                nexts = [self.next_of[slot] for slot in region.slots]
                module.kernels = RegionKernels(
                    module.label, module.step, module.first, lambda: self._start_of_loop(region, builder, nexts)
                )
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
            if is_trace_loop(region):
                leak = region.nodes[-1].args[2]
                return TraceRegion(_label(region), step, first, None if isinstance(leak, Node) else leak)  # type: ignore[arg-type]
            if extra or not folds_when_cut(self.program, region, builder.inputs):
                return LoopRegion(_label(region), step, first)
            return self._cut_loop(region, builder, step, first, wanted, nexts)

        state: Any = self.state_of(region.slots) if region.slots else ()
        call = self._emit_sequence_call(region, builder, make, multi_step_forward, wanted, constants, {"state": state})
        outputs = self.graph.call_function(operator.getitem, (call, 0))
        for index, node in enumerate(wanted):
            self._define(node, self.graph.call_function(operator.getitem, (outputs, index)))
        self.loop_calls.update({slot: (call, index) for index, slot in enumerate(region.slots)})

    def _start_of_loop(self, region: Region, builder: RegionBuilder, nexts: list[Any]) -> RegionGraph:
        """`(*constants, *inputs) -> (states before the first step, states after it)`, from the reset state."""
        by_slot = {node.meta["slot"]: node for node in self.program.slot_nodes()}
        slots = [by_slot[slot] for slot in region.slots]
        return builder.graph_module(slots, nexts, region.slots, first=True, extra_input=not builder.inputs)

    def _cut_loop(
        self,
        region: Region,
        builder: RegionBuilder,
        step: RegionGraph,
        first: RegionGraph,
        wanted: list[Node],
        nexts: list[Any],
    ) -> CutLoopRegion:
        by_slot = {node.meta["slot"]: node for node in self.program.slot_nodes()}
        slots = [by_slot[slot] for slot in region.slots]
        return CutLoopRegion(
            _label(region),
            step,
            first,
            start=self._start_of_loop(region, builder, nexts),
            advance=builder.graph_module((), nexts, region.slots).without_dead_code(),
            outputs=builder.graph_module(wanted, (), region.slots).without_dead_code(),
            input_dims=[node.meta["batch_dim"] for node in builder.inputs],
            state_dims=[node.meta["batch_dim"] for node in slots],
            output_dims=[node.meta["batch_dim"] for node in wanted],
        )

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
        value.meta["step_node"] = node.name
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

    def returned(self, value: Any) -> Any:
        """An output: a sequence, or its reduction over time."""
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
        has_batch = has_batch_in_front(initial)
        is_held = following is placeholder
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
        if is_held:
            return self.graph.call_function(hold_over_time, (state, initial, self.steps()))
        arguments = (self._as_sequence(following), state, initial, self.steps(), slot, has_batch)
        return self.graph.call_function(delay_one_step, arguments)

    def _final_state(self, slot: str) -> Any:
        if slot in self.loop_calls:
            call, index = self.loop_calls[slot]
            finals = self.graph.call_function(operator.getitem, (call, 1))
            return self.graph.call_function(operator.getitem, (finals, index))
        following = self.next_of[slot]
        if not isinstance(following, Node):
            return following
        return self.graph.call_function(operator.getitem, (self._as_sequence(following), -1))


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
