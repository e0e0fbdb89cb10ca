"""Values inside a net over time: `net.run(x_seq, record=("lif1", "lif1.v"))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from snnfx.emit.compiled_graph import compile_graph
from snnfx.emit.emitted_graphs import REGIONS
from snnfx.emit.executable import Executable
from snnfx.emit.multi_step import emit_multi_step
from snnfx.errors import InputError
from snnfx.ir.program import StepProgram

__all__ = ["Recordings"]


class Recordings:
    """Forms of the emitted graphs that also return values over time, made at their first use."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self._runners: dict[tuple[bool, tuple[str, ...]], Callable[..., Any]] = {}

    def runner(self, names: tuple[str, ...]) -> Callable[..., Any]:
        """The form for the current mode that returns the values of modules and slots of these names.

        Raises:
            InputError: SNNFX311, there is nothing of such a name, or it has no value at each step.
        """
        key = (self.executable.training, names)
        if key not in self._runners:
            self._runners[key] = self._emit(names)
        return self._runners[key]

    def _emit(self, names: tuple[str, ...]) -> Callable[..., Any]:
        graphs, program, reduce = self.executable.graphs, self.executable.program, self.executable.options.reduce
        nodes = [_recorded_node(program, name) for name in names]
        if any(node.meta.get("sunk") for node in nodes if isinstance(node, Node)):
            raise InputError(
                "SNNFX311",
                f"one of {', '.join(names)} runs on the {reduce} over time",
                why=f"with reduce={reduce!r} it has no value at each step.",
                hint="Convert without reduce= to record it.",
            )
        label = f"record_{len(self._runners)}"
        emitted = emit_multi_step(program, f"{REGIONS}.{label}", graphs.target_name, nodes, reduce=reduce)
        graphs.keep(label, emitted.regions)
        return compile_graph(emitted.graph)


def _recorded_node(program: StepProgram, name: str) -> Any:
    """What has the value of a slot after a step, or the output of a module."""
    for slot, following in zip(program.slots, program.next_states, strict=True):
        if slot.name == name:
            return following
    known = {slot.name for slot in program.slots}
    found = None
    for node in program.graph.nodes:
        returned = node.meta.get("returned_by", ())
        known.update(returned)
        found = node if name in returned else found
    if found is None:
        raise InputError(
            "SNNFX311",
            f"there is nothing called `{name}` to record",
            why=f"known are {', '.join(sorted(k for k in known if k))}.",
        )
    return found
