"""Name tensors after the module (with its class) or the operation that makes them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx import Node

from snnfx.emit.tiling import name_of_call
from snnfx.functional import multi_step_forward
from snnfx.ir.facts import STEP_NODE
from snnfx.ir.printing import describe_node
from snnfx.ir.program import Region, StepProgram
from snnfx.recompute.batch_statistics import normalize
from snnfx.recompute.tile import Tile, run_tile
from snnfx.regions.sequence_region import RegionGraph
from snnfx.sandbox.pytree_paths import flatten_with_path

__all__ = ["Naming"]


class Naming:
    """Tracks the name of the module or operation that runs.

    Args:
        executable: whose step names the nodes.
        regions: the regions of the executable, or their parts.
        tiles: the tiles, by name.

    Attributes:
        current: the name of the tensors that are made next.
    """

    def __init__(self, program: StepProgram, regions: Sequence[Region], tiles: Mapping[str, Tile]) -> None:
        self.program, self.current, self.tiles = program, "", tiles
        self.slots = {region.name: region.slots for region in regions}
        self.contents = {
            region.name: list(dict.fromkeys(self.of_node(n) for n in region.nodes if n.op != "placeholder"))
            for region in regions
        }

    def enter(self, region: str) -> None:
        """Begin a call: tensors without a better name are named after its region."""
        self.current = self.of_region(region)

    def of_region(self, region: str) -> str:
        """The module in a region; "... and others" if there are several."""
        names = self.contents.get(region) or [region]
        modules = [name for name in names if name.endswith(")")] or names
        return modules[0] if len(modules) == 1 else f"{modules[0]} and others"

    def of_node(self, node: Node) -> str:
        """The name of a node of the step graph or of the graph of a region."""
        step = self.program.nodes_by_name.get(node.meta.get("step_node", node.name), node)
        module = self.program.module_of(step)
        if module is None and step.target is operator.getitem and isinstance(step.args[0], Node):
            return self.of_node(step.args[0])
        return describe_node(step) if module is None else f"{describe_node(step)} ({type(module).__name__})"

    def of_results(self, call: Node, template: Any) -> list[str]:
        """The names of the tensors that a call of the emitted graph returns."""
        region = name_of_call(call) or call.name
        loops = [region]
        if call.target is run_tile:
            tile: Any = self.tiles[region]
            loops = [name_of_call(n) or "" for n in tile.graph.nodes if n.target is multi_step_forward]
        names = []
        for path, _ in flatten_with_path(template)[0]:
            keys = [entry.idx for entry in path if hasattr(entry, "idx")]
            node: Node | None = call
            for key in keys:
                users = node.users if node is not None else ()
                node = next((u for u in users if u.target is operator.getitem and u.args[1] == key), None)
            step = self.program.nodes_by_name.get(STEP_NODE.of(node)) if node is not None else None
            # A loop returns its states as second result; a tile returns there the states of each of its loops.
            state = (0, *keys[1:]) if call.target is multi_step_forward else tuple(keys[1:])
            if step is not None:
                names.append(self.of_node(step))
            elif keys[:1] == [1] and len(state) == 2 and state[1] < len(self.slots.get(loops[state[0]], ())):
                names.append(f"state {self.slots[loops[state[0]]][state[1]]}")
            else:
                names.append(self.of_region(region))
        return names

    def named(self, value: Any) -> Any:
        """Wrap a region graph or a tile so that `current` follows its nodes; return other values unchanged."""
        if isinstance(value, RegionGraph):
            return self._interpreter_of(value, value.graph)
        if isinstance(value, Tile):
            run = self._interpreter_of(value, value.graph)
            return _NamedTile(lambda _, *args: run(*args))
        return value

    def _interpreter_of(self, module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
        naming = self

        class NamingInterpreter(fx.Interpreter):
            def run_node(self, n: Node) -> Any:
                if n.op.startswith("call") and (n.target is normalize or name_of_call(n) is None):
                    naming.current = naming.of_node(n)
                return super().run_node(n)

        return lambda *args: NamingInterpreter(module, graph=graph).run(*args)


@dataclass
class _NamedTile:
    """Stand-in for a tile, for `run_tile`."""

    run: Callable[..., Any]
