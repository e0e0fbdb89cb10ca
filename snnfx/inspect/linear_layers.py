"""The library of the dense linear layers at their latest call, for `explain`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from snnfx.ir.facts import KIND
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.lowering.choices.linear_layers import latest_linear_choice

__all__ = ["linear_layers"]


def linear_layers(program: StepProgram) -> Iterator[str]:
    """A sentence for each library but torch's BLAS and reason, with its layers; nothing before the first call."""
    names: dict[tuple[str, str], list[str]] = {}
    for node in program.graph.nodes:
        if node.op != "call_module" or KIND.of(node) == "loop":
            continue
        layer = program.resolve(str(node.target))
        choice = latest_linear_choice(tuple(layer.weight.shape)) if type(layer) is nn.Linear else None
        if choice is not None and choice.name != "torch":
            names.setdefault((choice.name, choice.reason), []).append(f"`{describe_node(node)}`")
    for (name, reason), nodes in names.items():
        listed = f"{', '.join(nodes[:-1])} and {nodes[-1]}" if len(nodes) > 1 else nodes[0]
        yield f"Dense products run in {name} in {listed} ({reason})."
