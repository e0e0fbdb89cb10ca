"""Who made a tensor, in the user's words: the module with its class, or the operation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx import Node
from torch.utils import _pytree as pytree

from snnfx.program import describe_node
from snnfx.regions import RegionGraph

if TYPE_CHECKING:
    from snnfx.net import Net

__all__ = ["Naming"]


class Naming:
    """The name of what runs at the moment.

    Args:
        net: whose step names the nodes.

    Attributes:
        current: the name for what is made now.
    """

    def __init__(self, net: Net) -> None:
        self.program, self.current = net.program, ""
        self.slots = {region.name: region.slots for region in self.program.regions}
        self.contents = {
            region.name: list(dict.fromkeys(self.of_node(n) for n in region.nodes if n.op != "placeholder"))
            for region in self.program.regions
        }

    def enter(self, region: str) -> None:
        """A call begins; what is not known better is named after all of it."""
        self.current = self._of_region(region)

    def _of_region(self, region: str) -> str:
        names = self.contents.get(region) or [region]
        modules = [name for name in names if name.endswith(")")] or names
        return modules[0] if len(modules) == 1 else f"{modules[0]} and others"

    def of_node(self, node: Node) -> str:
        """A node of the step, or of a region's graph, which has the same names."""
        step = self.program.nodes_by_name.get(node.name, node)
        module = self.program.module_of(step)
        if module is None and step.target is operator.getitem and isinstance(step.args[0], Node):
            return self.of_node(step.args[0])
        return describe_node(step) if module is None else f"{describe_node(step)} ({type(module).__name__})"

    def of_results(self, call: Node, template: Any) -> list[str]:
        """The names of the tensors in what a call of the emitted graph returns."""
        region = call.meta.get("region_name") or call.name
        slots = self.slots.get(region, [])
        names = []
        for path, _ in pytree.tree_flatten_with_path(template)[0]:
            keys = [entry.idx for entry in path if hasattr(entry, "idx")]
            node: Node | None = call
            for key in keys:
                users = node.users if node is not None else ()
                node = next((u for u in users if u.target is operator.getitem and u.args[1] == key), None)
            step = self.program.nodes_by_name.get(node.meta.get("step_node", "")) if node is not None else None
            if step is not None:
                names.append(self.of_node(step))
            elif len(keys) == 2 and keys[0] == 1 and keys[1] < len(slots):
                names.append(f"state {slots[keys[1]]}")
            else:
                names.append(self._of_region(region))
        return names

    def named(self, value: Any) -> Any:
        """The graph of a region so that `current` follows its nodes; anything else as it is."""
        return self._following(value) if isinstance(value, RegionGraph) else value

    def _following(self, graph: RegionGraph) -> Callable[..., Any]:
        naming = self

        class Following(fx.Interpreter):
            def run_node(self, n: Node) -> Any:
                naming.current = naming.of_node(n)
                return super().run_node(n)

        return lambda *args: Following(graph).run(*args)
