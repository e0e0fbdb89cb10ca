"""The memory format of the convolutions at their latest call, for `explain`."""

from __future__ import annotations

from collections.abc import Iterator

from snnfx.analysis.image_operations import convolution_of
from snnfx.ir.facts import CHANNELS_LAST, KIND
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.lowering.choices.image_formats import latest_choice

__all__ = ["image_formats"]


def image_formats(program: StepProgram) -> Iterator[str]:
    """A sentence for each format and reason, with its convolutions; nothing before the first call."""
    names: dict[tuple[str, str], list[str]] = {}
    for node in program.graph.nodes:
        if not CHANNELS_LAST.is_known(node) or KIND.of(node) == "loop":
            continue
        settings = convolution_of(program, node)
        choice = None if settings is None else latest_choice(settings)
        if choice is not None:
            names.setdefault((choice.name, choice.reason), []).append(f"`{describe_node(node)}`")
    for (name, reason), nodes in names.items():
        listed = f"{', '.join(nodes[:-1])} and {nodes[-1]}" if len(nodes) > 1 else nodes[0]
        yield f"Images are {'row-major' if name == 'one by one' else name} in {listed} ({reason})."
