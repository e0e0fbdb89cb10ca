"""What all emitted graphs have in common: placeholders, attributes of the net, region modules, the state as a dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx import Node

from snnfx.ir.edits import add_placeholder
from snnfx.ir.program import StepProgram
from snnfx.ops.memory_format import row_major
from snnfx.ops.sequence_functions import select_state

__all__ = ["Emitted", "Emitter", "TargetName"]

TargetName = Callable[[str], str]
"""From a target of the program to the attribute path on the net."""


@dataclass
class Emitted:
    """An emitted graph and the region modules that it refers to as ``<container>.<region name>``."""

    graph: fx.Graph
    regions: dict[str, nn.Module] = field(default_factory=dict)


class Emitter:
    """A graph in the making.

    Args:
        program: at stage "partitioned".
        container: where the net will keep the region modules.
        target_name: from a target of the program to the attribute path on the net.
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
        return self.graph.call_function(select_state, (self.state, tuple(slots)))

    def for_the_caller(self, node: Any, value: Any) -> Any:
        """The emitted value of a node as it leaves the net: row-major, whatever was chosen inside."""
        if isinstance(node, Node) and node.meta.get("channels_last"):
            return self.graph.call_function(row_major, (value,))
        return value

    def finish(self, outputs: Any, state: dict[str, Any], records: Any = ()) -> Emitted:
        self.graph.output((tuple(outputs), state, tuple(records)))
        return Emitted(self.graph, self.regions)
