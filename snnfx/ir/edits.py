"""Edits of a step program shared by several passes: add slots and placeholders, replace reads."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx import Node

from snnfx.ir.facts import copy_facts
from snnfx.ir.nodes import is_outside_reader
from snnfx.ir.program import Slot, StepProgram

__all__ = ["add_placeholder", "add_slot", "replace_reads_outside"]


def add_placeholder(graph: fx.Graph, name: str, **default: Any) -> Node:
    """Add a placeholder whose name is a valid and unique argument name, close to `name`."""
    identifier = "".join(c if c.isalnum() else "_" for c in name) or "value"
    if identifier[0].isdigit():
        identifier = f"layer_{identifier}"
    if keyword.iskeyword(identifier):
        identifier += "_"
    node = graph.placeholder(identifier, **default)
    node.target = node.name
    return node


def add_slot(program: StepProgram, name: str, like: Node) -> Node:
    """Add a state slot and return its placeholder; the caller adds the next state and the initial value."""
    taken = {slot.name for slot in program.slots}
    unique, count = name, 1
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(first):
        placeholder = add_placeholder(program.graph, unique.replace(".", "_"))
    copy_facts(like, placeholder)
    placeholder.meta |= {"slot": unique, "added_by_rule": True}
    program.slots = [*program.slots, Slot(unique, placeholder.name)]
    return placeholder


def replace_reads_outside(
    program: StepProgram, value: Node, layer: set[Node], function: Callable[..., object], *more: Node
) -> None:
    """Replace reads of `value` outside its layer by reads of `function(value, *more)`."""
    graph = program.graph
    readers = [user for user in value.users if is_outside_reader(user, layer)]
    successor = value.next if value.op != "placeholder" else next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(successor):
        new = graph.call_function(function, (value, *more))
    copy_facts(value, new)
    for user in readers:
        user.replace_input_with(value, new)
    own = {slot.placeholder for slot in program.slots if program.nodes_by_name[slot.placeholder] in layer}
    program.set_output(
        [new if output is value else output for output in program.outputs],
        [
            new if following is value and slot.placeholder not in own else following
            for slot, following in zip(program.slots, program.next_states, strict=True)
        ],
        program.initial_values,
    )
