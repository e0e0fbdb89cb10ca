"""Derive the single-step form of a captured call that is pointwise in time but for its loops.

The step is the call at T = 1 with its loops inlined. The net then is an ordinary multi-step net: explicit state,
streaming, recording, chunks and online rules work. Other calls keep their graph on whole sequences.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node, map_arg

from snnfx.analysis.batch.facts import Fact
from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import MODULE, VALUE, WHERE, copy_facts
from snnfx.ir.nodes import is_size
from snnfx.ir.printing import operation_name
from snnfx.ir.program import Slot, StepProgram
from snnfx.ops.elements import concatenate_elements, read_elements, stack_elements, write_elements
from snnfx.ops.run_loop import run_loop
from snnfx.ops.step_functions import reduced_over_time
from snnfx.sandbox.torch_internals import BatchNormBase
from snnfx.sequence.call_capture import CapturedCall
from snnfx.sequence.final_values import reduce_final_values
from snnfx.sequence.pointwise_time import MixesTime, PointwiseTime, prove_pointwise
from snnfx.sequence.reroll import RolledLoop

__all__ = ["DerivedStep", "derive_step"]


@dataclass(frozen=True)
class DerivedStep:
    """One step of a model that runs over time itself.

    Args:
        program: the step, with the arguments and outputs of the model.
        time_dim: the time dimension of inputs and outputs.
        reduce: the reduction over time at the end of the call: "mean", "sum", "last" or None.
        behind: the nodes behind this reduction, by name.
        norms: "fold" if BatchNorms outside the loops take statistics over time, "per_step" if those inside take them
            of each step, None without BatchNorm.
    """

    program: StepProgram
    time_dim: int
    reduce: str | None = None
    behind: tuple[str, ...] = ()
    norms: str | None = None

    def mark_reduction(self) -> None:
        """Put a `reduced_over_time` in front of the nodes behind the mean, so that passes keep the two apart."""
        graph = self.program.graph
        behind = {node for node in graph.nodes if node.name in self.behind and not is_size(node)}
        for node in list(graph.nodes):
            for operand in node.all_input_nodes if node in behind else ():
                if operand in behind or is_size(operand) or operand.op == "get_attr":
                    continue
                with graph.inserting_before(node):
                    mark = graph.call_function(reduced_over_time, (operand,))
                copy_facts(operand, mark)
                node.replace_input_with(operand, mark)

    def nodes_behind(self) -> list[Node]:
        """The nodes behind the mean, also those that passes added."""
        found = set[Node]()
        for node in self.program.graph.nodes:
            is_behind = node.target is reduced_over_time or node.name in self.behind
            if is_behind or any(operand in found for operand in node.all_input_nodes):
                found.add(node)
        nodes = [node for node in self.program.graph.nodes if node in found]
        return [n for n in nodes if n.op != "output" and n.target is not reduced_over_time and not is_size(n)]


def derive_step(call: CapturedCall) -> DerivedStep:
    """The single-step form of a call.

    Raises:
        MixesTime: the call has none.
    """
    if call.time is None:
        raise MixesTime(call.fixed_length, next((n for n in call.program.graph.nodes if n.target is run_loop), None))
    call = reduce_final_values(call)
    program, time = call.program, call.time
    assert time is not None
    if not call.loops:
        raise MixesTime("the call has no loop over time")
    if program.persistent_slots:
        raise MixesTime(f"a loop changes `{program.persistent_slots[0].name}`, which outlives the call")
    if program.carried:
        raise MixesTime("the call carries arguments from call to call")
    proof = prove_pointwise(program, time, {loop.target: loop.varying for loop in call.loops})
    return _Derivation(call, proof, time.size).derived()


@dataclass
class _Derivation:
    call: CapturedCall
    proof: PointwiseTime
    size: int
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[Node, Any] = field(default_factory=dict)
    """The value in the step of each node of the call; the time dimension has size 1."""
    without_time: dict[Node, tuple[Node, int]] = field(default_factory=dict)
    """`(value without the time dimension, this dimension)` of nodes of the step that insert it."""
    slots: list[tuple[Slot, Any, Any]] = field(default_factory=list)
    """`(slot, next value, initial value)`."""
    constants: dict[str, Any] = field(default_factory=dict)

    def derived(self) -> DerivedStep:
        program = self.call.program
        loops = {loop.target: loop for loop in self.call.loops}
        inputs = self._add_inputs()
        states = {target: self._add_slots(loop) for target, loop in loops.items()}
        relevant = [n for n in self.proof.relevant if n.op != "placeholder"]
        called = {str(n.args[0].target) for n in relevant if n.target is run_loop}  # type: ignore[union-attr]
        if called != loops.keys():
            missing = next(loop for target, loop in loops.items() if target not in called)
            raise MixesTime(f"no output depends on the loop at {missing.location}")
        for node in relevant:
            if node.target is run_loop:
                target = str(node.args[0].target)  # type: ignore[union-attr]
                self.values[node] = (self._inline(loops[target], node, states[target]), None)
            elif node.op != "get_attr" or node.target not in loops:
                self.values[node] = self._add(node)
        outputs = [self._output(made) if isinstance(made, Node) else made for made in program.outputs]
        slots, nexts, initial = zip(*self.slots, strict=True) if self.slots else ((), (), ())
        self.graph.output((tuple(outputs), tuple(nexts), tuple(initial)))
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        known = {**program.constants, **self.constants}
        step = replace(
            program,
            graph=self.graph,
            constants={name: value for name, value in known.items() if name in used},
            input_leaves=[replace(x, placeholder=inputs.get(x.placeholder or "")) for x in program.input_leaves],
            slots=list(slots),
            first_step=None,
            setting_reads=list(program.setting_reads),
            initial_attributes=[],
            overwritten=frozenset(),
            requirements={},
            regions=[],
            stage="captured",
        )
        behind = [self.values[n].name for n in self.proof.behind if isinstance(self.values.get(n), Node)]
        return DerivedStep(step, self.proof.time_dim, self.proof.reduce, tuple(behind), self._norms(relevant))

    def _norms(self, relevant: list[Node]) -> str | None:
        program = self.call.program
        outside = [n for n in relevant if isinstance(program.module_of(n), BatchNormBase)]
        inside = [
            n for loop in self.call.loops for n in loop.program.graph.nodes if _is_norm(loop.program, n)
        ]  # fmt: skip
        if outside and inside:
            raise MixesTime(
                f"the BatchNorm `{inside[0].target}` takes statistics of each time step, and `{outside[0].target}` "
                "takes them over all",
                outside[0],
            )
        return "fold" if outside else "per_step" if inside else None

    # -- inputs and states --------------------------------------------------------------------------------------------

    def _add_inputs(self) -> dict[str, str]:
        names: dict[str, str] = {}
        assert self.call.time is not None
        for node in self.call.program.input_nodes():
            placeholder = add_placeholder(self.graph, node.name)
            placeholder.meta = dict(node.meta)
            value = VALUE.of(node)
            VALUE.set(placeholder, value.select(self.call.time.dim, 0))
            names[node.name] = placeholder.name
        return names

    def _add_slots(self, loop: RolledLoop) -> dict[Node, Node]:
        taken = {slot.name for slot, _, _ in self.slots}
        found: dict[Node, Node] = {}
        step = loop.program
        for slot, node in zip(step.slots, step.slot_nodes(), strict=True):
            names = itertools.chain((slot.name,), (f"{slot.name}_{i}" for i in itertools.count(1)))
            name = next(n for n in names if n not in taken)
            taken.add(name)
            placeholder = add_placeholder(self.graph, name.replace(".", "_"))
            placeholder.meta = dict(node.meta) | {"slot": name}
            found[node] = placeholder
            self.slots.append((replace(slot, name=name, placeholder=placeholder.name), None, None))
        return found

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _add(self, node: Node) -> Any:
        """The value in the step of a node of the call."""
        if node in self.proof.reductions:
            operand = node.args[0]
            return self._element(operand, self._time_of(operand))
        if node.target is operator.getitem and isinstance(self._known(node.args[0]), tuple):
            value = self._known(node.args[0])[node.args[1]]
            return self._with_time(value, 0) if isinstance(value, Node) else value
        if node.target is read_elements and self._time_of(node.args[0]) is not None:
            return self._with_time(self._element(node.args[0], node.args[1]), 0)
        if node.target is stack_elements or node.target is concatenate_elements:
            element = self._element(node.args[0][0], 0)  # type: ignore[index]
            if node.target is concatenate_elements:
                return element
            dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
            return self._with_time(element, dim % VALUE.of(node).dim())
        if node.target is write_elements:
            element, dtype = self._element(node.args[4], 0), VALUE.of(node).dtype
            if VALUE.of(element).dtype != dtype:
                element = self._call("call_method", "to", (element, dtype), VALUE.of(element).to(dtype))
            return self._with_time(element, node.args[1])
        if operation_name(node) == "flatten" and tuple(node.args[1:]) == (0, 1) and not node.kwargs:
            inner = self.without_time.get(self._known(node.args[0]))
            if inner is not None and inner[1] == 0:
                return inner[0]
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
        self._set_example(node, new)
        return new

    def _known(self, node: Any) -> Any:
        return self._value(node) if isinstance(node, Node) else None

    def _value(self, node: Node) -> Any:
        if node.op == "placeholder" and node not in self.values:
            name = node.name
            placeholder = next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == name)
            assert self.call.time is not None
            self.values[node] = self._with_time(placeholder, self.call.time.dim)
        return self.values[node]

    def _time_of(self, node: Any) -> int | None:
        fact = self.proof.facts.get(node)
        return fact.dim if isinstance(fact, Fact) else None

    def _with_time(self, value: Node, dim: Any) -> Node:
        """The value with a time dimension of size 1."""
        example = VALUE.of(value)
        new = self._call("call_function", torch.unsqueeze, (value, dim), _map(example, lambda x: x.unsqueeze(dim)))
        MODULE.set(new, MODULE.of(value))
        self.without_time[new] = (value, dim)
        return new

    def _element(self, node: Any, dim: Any) -> Node:
        """The value of a node of the call without its time dimension."""
        value = self._value(node)
        inner = self.without_time.get(value)
        if inner is not None and inner[1] == dim:
            return inner[0]
        example = VALUE.of(value)
        new = self._call("call_method", "select", (value, dim, 0), _map(example, lambda x: x.select(dim, 0)))
        MODULE.set(new, MODULE.of(value))
        if WHERE.is_known(value):
            WHERE.set(new, WHERE.of(value))
        return new

    def _output(self, node: Any) -> Node:
        if self.proof.reduce is not None:
            return self._value(node)  # type: ignore[no-any-return]
        return self._element(node, self.proof.time_dim)

    def _call(self, op: str, target: Any, args: tuple[Any, ...], example: Any) -> Node:
        node = self.graph.create_node(op, target, args)
        node.meta = {"module": ""}
        if example is not None:
            VALUE.set(node, example)
        return node

    def _set_example(self, node: Node, new: Node) -> None:
        """Set the example value of a node of the step."""
        if is_size(node):
            values = map_arg((new.args, new.kwargs), lambda n: VALUE.of(n))
            if new.op == "call_function":
                VALUE.set(new, new.target(*values[0], **values[1]))  # type: ignore[operator]
            elif isinstance(values[0][0], Tensor):
                VALUE.set(new, getattr(values[0][0], str(new.target))(*values[0][1:], **values[1]))
            return
        if node in self.proof.behind or not VALUE.is_known(node):
            return
        fact, value = self.proof.facts.get(node), VALUE.of(node)
        if isinstance(value, tuple | list):
            facts = fact if isinstance(fact, tuple) and len(fact) == len(value) else [None] * len(value)
            if isinstance(fact, tuple) and len(fact) == 1:
                facts = list(fact) * len(value)
            VALUE.set(new, type(value)(self._at_one_step(f, v) for f, v in zip(facts, value, strict=True)))
        else:
            VALUE.set(new, self._at_one_step(fact, value))

    def _at_one_step(self, fact: Any, value: Any) -> Any:
        if not isinstance(value, Tensor) or not isinstance(fact, Fact) or fact.dim is None:
            return value
        return value.narrow(fact.dim, 0, value.shape[fact.dim] // self.size)

    # -- loops ------------------------------------------------------------------------------------------------------

    def _inline(self, loop: RolledLoop, node: Node, states: dict[Node, Node]) -> tuple[Any, ...]:
        """Copy the step of a loop, and return its outputs."""
        step, values = loop.program, node.args[2]
        self.constants.update(step.constants)
        copies: dict[Node, Any] = dict(states)
        inputs = zip(step.input_nodes(), values, loop.varying, strict=True)  # type: ignore[arg-type]
        for placeholder, value, varies in inputs:
            copies[placeholder] = self._element(value, 0) if varies else self._value(value)
        for inner in step.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            new = self.graph.node_copy(inner, lambda n: copies[n])
            new.meta = dict(inner.meta)
            copies[inner] = new
        outputs, nexts, initial = map_arg(step.results, lambda n: copies[n])
        names = {placeholder.name for placeholder in states.values()}
        following = iter(zip(nexts, initial, strict=True))
        self.slots = [
            (slot, *next(following)) if slot.placeholder in names else (slot, after, first)
            for slot, after, first in self.slots
        ]
        return tuple(outputs)


def _is_norm(program: StepProgram, node: Node) -> bool:
    return isinstance(program.module_of(node), BatchNormBase)


def _map(example: Any, function: Any) -> Any:
    return function(example) if isinstance(example, Tensor) else None
