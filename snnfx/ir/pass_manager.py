"""Passes over a step program, and the manager that runs them, verifies between them and keeps the history.

A pass is a frozen dataclass with a `name`; its fields are its options. It says at which stage it takes a program and
which stage it leaves. Between any two passes the program is verified; a pass that breaks it is named, with the node
and the lines of IR around it. With SNNFX_DEBUG=1 in the environment the IR after each pass is printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from torch.fx import Node

from snnfx.errors import PassError
from snnfx.ir.program import StepProgram, format_node

__all__ = ["STAGES", "Pass", "PassManager", "PassRecord", "verify_program"]

STAGES = ("captured", "normalized", "partitioned", "planned")
"""What is guaranteed of a program, each stage on top of the one before; see `verify_program`."""


@dataclass(frozen=True)
class Pass:
    """One transformation of a step program.

    Subclasses set `name`, the stage they `require` and, if they reach one, the stage they `ensure`, and implement
    `apply`, which changes the program and returns a short note of what it did.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[str] = "captured"
    ensures: ClassVar[str | None] = None

    def apply(self, program: StepProgram) -> str:
        """Change `program`; return a note such as "removed 3 nodes"."""
        raise NotImplementedError

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its description, the time it took in milliseconds, its note, and the IR after it."""

    description: str
    milliseconds: float
    note: str
    ir: str

    def __str__(self) -> str:
        return f"# {self.description} ({self.milliseconds:.1f} ms): {self.note}"


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order.

    Args:
        passes: the pipeline.
        verify: check the program between passes.
    """

    passes: Sequence[Pass]
    verify: bool = True

    def run(self, program: StepProgram, history: list[PassRecord] | None = None) -> list[PassRecord]:
        """Apply all passes to `program` in place.

        Returns:
            The history, one record a pass.

        Raises:
            PassError: a pass is asked for at the wrong stage (SNNFX502) or left the graph invalid (SNNFX501).
        """
        history = history if history is not None else []
        for item in self.passes:
            if STAGES.index(program.stage) < STAGES.index(item.requires):
                raise PassError(
                    "SNNFX502",
                    f"the pass `{item.name}` takes a program at stage {item.requires!r}, this one is {program.stage!r}",
                    hint=f"Run the passes that lead to {item.requires!r} before it.",
                )
            start = time.perf_counter()
            note = item.apply(program)
            if item.ensures is not None:
                program.stage = item.ensures
            milliseconds = (time.perf_counter() - start) * 1e3
            record = PassRecord(str(item), milliseconds, note, str(program))
            history.append(record)
            if os.environ.get("SNNFX_DEBUG") == "1":
                print(f"{record}\n{record.ir}\n", file=sys.stderr)
            if self.verify:
                verify_program(program, after=item.name)
        return history


def verify_program(program: StepProgram, after: str = "capture") -> None:
    """Check what every program has to satisfy, and what its stage adds.

    Raises:
        PassError: SNNFX501, naming the pass, the node, and ten lines of IR around it.
    """

    def require(condition: bool, node: Node | None, why: str) -> None:
        if not condition:
            raise PassError("SNNFX501", f"the pass `{after}` broke the graph", why=f"{why}.\n{_excerpt(program, node)}")

    try:
        program.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        require(False, None, f"graph.lint says: {error}")
    nodes = list(program.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    outputs = program.output.args[0]
    require(
        isinstance(outputs, tuple) and len(outputs) == 3,
        program.output,
        "the output is not (outputs, next states, initial values)",
    )
    require(
        len(program.next_states) == len(program.slots) == len(program.initial_values),
        program.output,
        f"{len(program.slots)} slots, but {len(program.next_states)} next and "
        f"{len(program.initial_values)} initial values",
    )
    by_name = program.nodes_by_name
    for slot in program.slots:
        placeholder = by_name.get(slot.placeholder)
        if program.first_step is None or slot.placeholder:
            require(placeholder is not None, None, f"the slot {slot.name} has no placeholder {slot.placeholder!r}")
            reads = placeholder.meta.get("slot") if placeholder is not None else None
            require(reads == slot.name, placeholder, f"it is not the placeholder of slot {slot.name}")
    for node in nodes:
        for operand in node.all_input_nodes:
            require(
                operand in position and position[operand] < position[node], node, f"{operand} does not come before it"
            )
        if node.op in ("get_attr", "call_module"):
            require(_resolves(program.resolve, str(node.target)), node, f"the model has no `{node.target}`")
    if STAGES.index(program.stage) >= STAGES.index("partitioned"):
        _verify_regions(program, require)


def _resolves(resolve: Callable[[str], object], target: str) -> bool:
    try:
        resolve(target)
    except AttributeError:
        return False
    return True


def _verify_regions(program: StepProgram, require: Callable[[bool, Node | None, str], None]) -> None:
    """Every node is in one region at most, regions are convex, and state lives in loops only."""
    region_of: dict[Node, int] = {}
    for index, region in enumerate(program.regions):
        for node in region.nodes:
            require(node not in region_of, node, f"it is in two regions, one is {region.name}")
            require(node.graph is program.graph, node, f"region {region.name} holds a node of another graph")
            region_of[node] = index
        if region.kind != "loop":
            require(not region.slots, None, f"the {region.kind} region {region.name} holds the state {region.slots}")
    for index, region in enumerate(program.regions):
        for node in region.nodes:
            for operand in node.all_input_nodes:
                if operand in region_of:
                    require(
                        region_of[operand] <= index, node, f"its operand {operand} is in a later region: not convex"
                    )


def _excerpt(program: StepProgram, node: Node | None, around: int = 5) -> str:
    nodes = list(program.graph.nodes)
    index = nodes.index(node) if node in nodes else 0
    lines = []
    for i in range(max(0, index - around), min(len(nodes), index + around + 1)):
        marker = "--> " if node is not None and i == index else "    "
        lines.append(marker + format_node(nodes[i]))
    return "\n".join(lines)
