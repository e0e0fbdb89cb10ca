"""Verify a step program: the rules of each stage, checked between passes."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from snnfx.errors import PassError
from snnfx.ir.printing import format_node
from snnfx.ir.program import STAGES, StepProgram

__all__ = ["verify_program"]


def verify_program(program: StepProgram, after: str = "capture") -> None:
    """Check the invariants of every program and of its stage.

    Raises:
        PassError: SNNFX501, with the pass, the node, and ten lines of IR around it.
    """

    def require(condition: bool, node: Node | None, why: str) -> None:
        if not condition:
            raise PassError("SNNFX501", f"the pass `{after}` broke the graph", why=f"{why}.\n{_excerpt(program, node)}")

    try:
        program.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        require(False, None, f"graph.lint failed: {error}")
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
    """Check that regions are disjoint and convex, and that only loops have state slots."""
    region_of: dict[Node, int] = {}
    for index, region in enumerate(program.regions):
        for node in region.nodes:
            require(node not in region_of, node, f"it is in two regions, one of them {region.name}")
            require(node.graph is program.graph, node, f"region {region.name} contains a node of another graph")
            region_of[node] = index
        if region.kind != "loop":
            require(
                not region.slots,
                None,
                f"the {region.kind} region {region.name} contains the state slots {region.slots}",
            )
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
