"""Who made a tensor, in the user's words: the module with its class, or the operation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx import Node

from snnfx.emit.tiling import name_of_call
from snnfx.functional import multi_step_forward
from snnfx.ir.printing import describe_node
from snnfx.ir.program import Region, StepProgram
from snnfx.recompute.batch_statistics import normalize
from snnfx.recompute.tile import Tile, run_tile
from snnfx.regions.region_modules import RegionGraph
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Naming"]


class Naming:
    """The name of what runs at the moment.

    Args:
        program: whose step names the nodes.
        regions: that run, of the net or parts of these.
        tiles: that run, by name.

    Attributes:
        current: the name for what is made now.
    """

    def __init__(self, program: StepProgram, regions: Sequence[Region], tiles: Mapping[str, Tile]) -> None:
        self.program, self.current, self.tiles = program, "", tiles
        self.slots = {region.name: region.slots for region in regions}
        self.contents = {
            region.name: list(dict.fromkeys(self.of_node(n) for n in region.nodes if n.op != "placeholder"))
            for region in regions
        }

    def enter(self, region: str) -> None:
        """A call begins; what is not known better is named after all of it."""
        self.current = self.of_region(region)

    def of_region(self, region: str) -> str:
        """The module in a region, or one of them."""
        names = self.contents.get(region) or [region]
        modules = [name for name in names if name.endswith(")")] or names
        return modules[0] if len(modules) == 1 else f"{modules[0]} and others"

    def of_node(self, node: Node) -> str:
        """A node of the step, or of a region's graph, which has the same names."""
        step = self.program.nodes_by_name.get(node.meta.get("step_node", node.name), node)
        module = self.program.module_of(step)
        if module is None and step.target is operator.getitem and isinstance(step.args[0], Node):
            return self.of_node(step.args[0])
        return describe_node(step) if module is None else f"{describe_node(step)} ({type(module).__name__})"

    def of_results(self, call: Node, template: Any) -> list[str]:
        """The names of the tensors in what a call of the emitted graph returns."""
        region = name_of_call(call) or call.name
        loops = [region]
        if call.target is run_tile:
            tile: Any = self.tiles[region]
            loops = [name_of_call(n) or "" for n in tile.graph.nodes if n.target is multi_step_forward]
        names = []
        for path, _ in pytree.tree_flatten_with_path(template)[0]:
            keys = [entry.idx for entry in path if hasattr(entry, "idx")]
            node: Node | None = call
            for key in keys:
                users = node.users if node is not None else ()
                node = next((u for u in users if u.target is operator.getitem and u.args[1] == key), None)
            step = self.program.nodes_by_name.get(node.meta.get("step_node", "")) if node is not None else None
            # The states of a loop are its second result; of a tile, the second result has those of each loop.
            state = (0, *keys[1:]) if call.target is multi_step_forward else tuple(keys[1:])
            if step is not None:
                names.append(self.of_node(step))
            elif keys[:1] == [1] and len(state) == 2 and state[1] < len(self.slots.get(loops[state[0]], ())):
                names.append(f"state {self.slots[loops[state[0]]][state[1]]}")
            else:
                names.append(self.of_region(region))
        return names

    def named(self, value: Any) -> Any:
        """The graph of a region, or a tile, so that `current` follows its nodes; anything else as it is."""
        if isinstance(value, RegionGraph):
            return self._following(value, value.graph)
        if isinstance(value, Tile):
            follower = self._following(value, value.graph)
            return _Following(lambda _, *args: follower(*args))
        return value

    def _following(self, module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
        naming = self

        class Following(fx.Interpreter):
            def run_node(self, n: Node) -> Any:
                if n.op.startswith("call") and (n.target is normalize or name_of_call(n) is None):
                    naming.current = naming.of_node(n)
                return super().run_node(n)

        return lambda *args: Following(module, graph=graph).run(*args)


@dataclass
class _Following:
    """Stands for a tile."""

    run: Callable[..., Any]
