"""Record values of modules and slots over time: `net.run(x_seq, record=("lif1", "lif1.v"))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx import Node

from snnfx.emit.compiled_graph import compile_graph
from snnfx.emit.emitted_graphs import REGIONS
from snnfx.emit.executable import Executable
from snnfx.emit.multi_step import emit_multi_step
from snnfx.errors import InputError
from snnfx.ir.facts import RETURNED_BY, SUNK
from snnfx.ir.program import StepProgram

__all__ = ["Recordings", "recorded_node"]


class Recordings:
    """Forms of the emitted graphs that also return values over time, made at their first use."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self._runners: dict[tuple[bool, tuple[str, ...]], Callable[..., Any]] = {}

    def runner(self, names: tuple[str, ...]) -> Callable[..., Any]:
        """The function that runs the graph of the current mode and also returns these values.

        Args:
            names: qualified names of modules and slots.

        Raises:
            InputError: SNNFX311, a name is unknown, or it has no value per time step.
        """
        key = (self.executable.training, names)
        if key not in self._runners:
            self._runners[key] = self._emit(names)
        return self._runners[key]

    def _emit(self, names: tuple[str, ...]) -> Callable[..., Any]:
        graphs, program, reduce = self.executable.graphs, self.executable.program, self.executable.options.reduce
        nodes = [recorded_node(program, name) for name in names]
        for name, node in zip(names, nodes, strict=True):
            if isinstance(node, Node) and SUNK.of(node):
                raise InputError(
                    "SNNFX311",
                    f"`{name}` has no value per time step to record",
                    why=f"with reduce={reduce!r} it runs once, on the {reduce} over time.",
                    hint="Convert without reduce= to record it.",
                )
        label = f"record_{len(self._runners)}"

        def emit() -> tuple[fx.Graph, fx.Graph, str]:
            emitted = emit_multi_step(program, f"{REGIONS}.{label}", graphs.target_name, nodes, reduce=reduce)
            graphs.keep(label, emitted.regions)
            return emitted.graph, emitted.graph, f"returns {', '.join(f'`{name}`' for name in names)} as well"

        return compile_graph(graphs.run("emit_recording", "main", self.executable.training, emit))


def recorded_node(program: StepProgram, name: str) -> Any:
    """The node, or constant, with the value of a slot after a step or the output of a module."""
    for slot, next_state in zip(program.slots, program.next_states, strict=True):
        if slot.name == name:
            return next_state
    recordable = {slot.name for slot in program.slots}
    output_node = None
    for node in program.graph.nodes:
        returned_by = RETURNED_BY.of(node)
        recordable.update(returned_by)
        output_node = node if name in returned_by else output_node
    if output_node is None:
        raise InputError(
            "SNNFX311",
            f"cannot record `{name}`",
            why="the step has no module or slot of this name.",
            hint=f"Record any of {', '.join(sorted(k for k in recordable if k))}.",
        )
    return output_node
