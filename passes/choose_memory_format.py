"""Choose the memory format of images: channels-last around 2-d convolutions (data layout selection).

On a CPU, oneDNN's convolutions and torch's pooling are several times faster with channels innermost in memory. The pass
marks the values that may be channels-last: results of 2-d convolutions, and values computed from them by operations
that accept any memory format and preserve it. Before any other reader (a `view`, an unknown operation, an output), the
emitted code converts the value to row-major. A convolution with more weights than its images have elements is faster
row-major; the emitted code decides at the call, where T and N are known.
Legal because the memory format does not change values, except for the rounding of another convolution kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from snnfx.analysis.image_operations import is_convolution, takes_any_layout
from snnfx.ir.facts import CHANNELS_LAST
from snnfx.ir.nodes import is_size
from snnfx.ir.program import StepProgram
from snnfx.passes.base import Pass

__all__ = ["ChooseMemoryFormat"]


@dataclass(frozen=True)
class ChooseMemoryFormat(Pass):
    """Mark the values that may be channels-last (the fact `CHANNELS_LAST`)."""

    name = "choose_memory_format"
    requires = "partitioned"
    may_change = ()

    def apply(self, program: StepProgram) -> str:
        following = dict(zip((s.placeholder for s in program.slots), program.next_states, strict=True))
        marked: set[Node] = set()
        before = -1
        while len(marked) != before:  # repeat, as a state carries the format to the next step
            before = len(marked)
            for node in program.graph.nodes:
                if _may_be_channels_last(program, node, marked, following):
                    marked.add(node)
            for region in program.regions:
                values = {operand for node in region.nodes for operand in (node, *node.all_input_nodes)}
                if region.kind == "loop" and marked & values:
                    # A kernel gives all its results the memory format of its input.
                    marked.update(n for n in region.nodes if not is_size(n))
        for node in program.graph.nodes:
            CHANNELS_LAST.clear(node)
        for node in marked:
            CHANNELS_LAST.set(node, True)
        convolutions = sum(is_convolution(program, node) for node in marked)
        return f"{len(marked)} values around {convolutions} convolutions may be channels-last"


def _may_be_channels_last(program: StepProgram, node: Node, marked: set[Node], following: dict[str, object]) -> bool:
    if node in marked or is_convolution(program, node):
        return True
    if is_size(node):
        return False  # a number or a dtype has no memory format
    if node.op == "placeholder":
        return following.get(node.name) in marked
    return takes_any_layout(program, node) and any(operand in marked for operand in node.all_input_nodes)
