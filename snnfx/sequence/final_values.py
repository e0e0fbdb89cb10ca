"""Express the values that loops leave as reductions of sequences: a last value, or the sum of a running total.

The step of a call has no value "after the last iteration". `mem` behind a loop is the last element of its sequence, and
`total` of `total = total + y` is the sum of the sequence of `y`. Divided by the number of time steps, it is a mean.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from snnfx.ir.facts import STRUCTURAL, VALUE
from snnfx.ir.nodes import is_size, without_detach
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.run_loop import run_loop
from snnfx.sequence.call_capture import CapturedCall
from snnfx.sequence.pointwise_time import TimeDimension, length_nodes
from snnfx.sequence.reroll import RolledLoop
from snnfx.sequence.roles import has_type_of

__all__ = ["reduce_final_values"]


def reduce_final_values(call: CapturedCall) -> CapturedCall:
    """A copy of a call in which nothing reads the final states of its loops."""
    assert call.time is not None
    program = call.program.copy()
    loops = [replace(loop, program=loop.program.copy()) for loop in call.loops]
    by_target = {loop.target: loop for loop in loops}
    for node in list(program.graph.nodes):
        if node.target is run_loop:
            _Finals(program, node, by_target[str(node.args[0].target)], call.time.size).reduce()
    _use_means(program, call.time)
    return replace(call, program=program, loops=loops)


@dataclass
class _Total:
    """A slot that sums up a value of the step: `total = total + y`."""

    slot: int
    summand: Node
    addition: Node


class _Finals:
    """The final states of one loop."""

    def __init__(self, program: StepProgram, call: Node, loop: RolledLoop, steps: int) -> None:
        self.program, self.call, self.steps = program, call, steps
        self.step = loop.program
        self.outputs = list(self.step.outputs)

    def reduce(self) -> None:
        """Replace the final states by reductions of outputs of the loop."""
        elements = [n for n in self.call.users if n.target is operator.getitem]
        finals = [user for n in elements if n.args[1] == 1 for user in n.users]
        values = next((n for n in elements if n.args[1] == 0), None) or self._outputs_node()
        totals = []
        for final in finals:
            slot: Any = final.args[1]
            if not final.users or self._is_threaded(slot):
                continue
            total = self._total(slot, final)
            following = self.step.next_states[slot]
            if total is not None:
                totals.append(total)
                self._replace(values, final, total.summand)
            elif isinstance(following, Node) and following.op != "placeholder" and has_type_of(following, final):
                self._replace(values, final, following)
        nexts, initial = list(self.step.next_states), list(self.step.initial_values)
        removed = {total.slot for total in totals}
        self.step.set_output(self.outputs, _without(nexts, removed), _without(initial, removed))
        placeholders = self.step.slot_nodes()
        self.step.slots = _without(self.step.slots, removed)
        for total in totals:
            self.step.graph.erase_node(total.addition)
            self.step.graph.erase_node(placeholders[total.slot])

    def _outputs_node(self) -> Node:
        with self.program.graph.inserting_after(self.call):
            node = self.program.graph.call_function(operator.getitem, (self.call, 0))
        node.meta = {"structural": True, "module": ""}
        return node

    def _is_threaded(self, slot: int) -> bool:
        """Whether the whole call keeps the state."""
        known = self.step.slots[slot]
        return bool(known.persistent) or known.name in self.call.args[3]  # type: ignore[operator]

    def _total(self, slot: int, final: Node) -> _Total | None:
        """The sum that a slot is, if only the sum itself reads it."""
        placeholder, addition = self.step.slot_nodes()[slot], self.step.next_states[slot]
        if not isinstance(addition, Node) or operation_name(addition) != "add" or len(addition.args) != 2:
            return None
        if addition.kwargs or set(placeholder.users) != {addition} or any(n.op != "output" for n in addition.users):
            return None
        if addition in self.step.outputs or self.step.next_states.count(addition) > 1:
            return None
        summands = [n for n in addition.args if n is not placeholder]
        if len(summands) != 1 or not _is_zero(self.step.initial_values[slot]):
            return None
        summand = summands[0]
        return _Total(slot, summand, addition) if isinstance(summand, Node) and has_type_of(summand, final) else None

    def _replace(self, values: Node, final: Node, of_step: Node) -> None:
        """Replace a final state by the sum, or the last element, of the sequence of a value of the step."""
        graph = self.program.graph
        if of_step in self.outputs:
            index = self.outputs.index(of_step)
        else:
            index = len(self.outputs)
            self.outputs.append(of_step)
        is_last = self.step.next_states[final.args[1]] is of_step  # type: ignore[index]
        with graph.inserting_before(final):
            sequence = graph.call_function(operator.getitem, (values, index))
            sequence.meta = {k: v for k, v in of_step.meta.items() if k in ("where", "module")}
            STRUCTURAL.set(sequence, True)
            if is_last:
                new = graph.call_function(operator.getitem, (sequence, -1))
            else:
                new = graph.call_function(torch.sum, (sequence, 0))
        example = VALUE.of(of_step)
        VALUE.set(sequence, example.new_empty((self.steps, *example.shape)))
        new.meta = {k: v for k, v in final.meta.items() if k in ("val", "where", "module")}
        final.replace_all_uses_with(new)


def _without(values: Iterable[Any], removed: set[int]) -> list[Any]:
    return [v for i, v in enumerate(values) if i not in removed]


def _is_zero(initial: Any) -> bool:
    if isinstance(initial, Node):
        initial = without_detach(initial)
        return operation_name(initial) in ("zeros", "zeros_like", "new_zeros") and not initial.kwargs.get(
            "requires_grad"
        )
    return isinstance(initial, int | float) and initial == 0


def _use_means(program: StepProgram, time: TimeDimension) -> None:
    """Replace sums over time that are divided by the number of time steps by means."""
    quotients = [n for n in program.graph.nodes if _is_quotient_of_sum(n)]
    lengths = length_nodes(program, time) if quotients else set()
    for node in quotients:
        total, divisor = node.args
        if divisor not in lengths or not isinstance(total, Node):
            continue
        with program.graph.inserting_before(node):
            mean = program.graph.call_function(torch.mean, total.args, total.kwargs)
        mean.meta = dict(node.meta)
        node.replace_all_uses_with(mean)
        program.graph.erase_node(node)
        if not total.users:
            program.graph.erase_node(total)


def _is_quotient_of_sum(node: Node) -> bool:
    """Whether a node divides a sum over one dimension by a size."""
    if operation_name(node) not in ("truediv", "div") or len(node.args) != 2 or node.kwargs:
        return False
    total, divisor = node.args
    if not isinstance(total, Node) or not isinstance(divisor, Node) or not is_size(divisor):
        return False
    is_plain = len(total.args) + len(total.kwargs) == 2 and total.kwargs.keys() <= {"dim"}
    return operation_name(total) == "sum" and is_plain
