"""Base class of the emitters: placeholders, module attributes, region modules and the state dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx import Node

from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import CHANNELS_LAST
from snnfx.ir.program import START_PREFIX, StepProgram
from snnfx.ops.memory_format import row_major
from snnfx.ops.sequence_functions import carry_gradient, select_state, start_value

__all__ = ["Emitted", "Emitter", "TargetName"]

TargetName = Callable[[str], str]
"""Maps a target of the program to an attribute path on the net."""


@dataclass
class Emitted:
    """An emitted graph and its region modules, which it refers to as `<container>.<region name>`."""

    graph: fx.Graph
    regions: dict[str, nn.Module] = field(default_factory=dict)


class Emitter:
    """Builds the emitted graph of a step program.

    Args:
        program: a program at stage "partitioned".
        container: the attribute path under which the net stores the region modules.
        target_name: maps a target of the program to an attribute path on the net.
    """

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
        """The `get_attr` node for a target of the program."""
        if target not in self.attributes:
            name = target.removeprefix(START_PREFIX)
            node = self.graph.get_attr(self.target_name(name))
            if name != target:
                node = self.graph.call_function(start_value, (self.state, name, node))
            elif any(slot.name == target for slot in self.program.persistent_slots):
                node = self.graph.call_function(carry_gradient, (node,))
            self.attributes[target] = node
        return self.attributes[target]

    def steps(self) -> Node:
        """The node of a tensor `[T]`, one element per time step."""
        return self.time

    def region(self, name: str, make: Callable[[], nn.Module]) -> Node:
        """The `get_attr` node for a region module, which is made unless another graph of the region made it."""
        if name not in self.regions:
            self.regions[name] = make()
        return self.graph.get_attr(f"{self.container}.{name}")

    def state_of(self, slots: Sequence[str]) -> Any:
        """The values of some slots before the first step; None: the reset state."""
        persistent = {slot.name for slot in self.program.persistent_slots}.intersection(slots)
        more = (tuple(name for name in slots if name in persistent),) if persistent else ()
        return self.graph.call_function(select_state, (self.state, tuple(slots), *more))

    def in_caller_layout(self, node: Any, value: Any) -> Any:
        """The emitted value of an output, converted to row-major if the net computes it in channels-last layout."""
        if isinstance(node, Node) and CHANNELS_LAST.of(node):
            return self.graph.call_function(row_major, (value,))
        return value

    def finish(self, outputs: Any, state: dict[str, Any], records: Any = ()) -> Emitted:
        self.graph.output((tuple(outputs), state, tuple(records)))
        return Emitted(self.graph, self.regions)
