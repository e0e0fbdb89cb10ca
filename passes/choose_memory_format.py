"""Choose the memory format of images: channels-last around 2-d convolutions (data layout selection).

On a CPU, oneDNN's convolutions and torch's pooling are several times faster when the channels are innermost in memory.
The pass marks the values that may have this format: those of 2-d convolutions, and what is computed from them by
operations that take any format and hand it on. Where such a value leaves them (a `view`, an operation that is not
known, an output), the emitted code brings it back to row-major. Convolutions with more weights than their images have
elements are faster row-major: which it is, is decided at the call, where T and N are known. Values are the same up to
the rounding of another convolution kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from snnfx.analysis.image_operations import is_convolution, takes_any_layout
from snnfx.ir.nodes import is_size
from snnfx.ir.program import StepProgram
from snnfx.passes.base import Pass

__all__ = ["ChooseMemoryFormat"]


@dataclass(frozen=True)
class ChooseMemoryFormat(Pass):
    """Mark the nodes whose values may be channels-last (`node.meta["channels_last"]`)."""

    name = "choose_memory_format"
    requires = "partitioned"

    def apply(self, program: StepProgram) -> str:
        following = dict(zip((s.placeholder for s in program.slots), program.next_states, strict=True))
        marked: set[Node] = set()
        before = -1
        while len(marked) != before:  # once more where a state hands the format on to the next step
            before = len(marked)
            for node in program.graph.nodes:
                if _may_be_channels_last(program, node, marked, following):
                    marked.add(node)
            for region in program.regions:
                values = {operand for node in region.nodes for operand in (node, *node.all_input_nodes)}
                if region.kind == "loop" and marked & values:
                    # One kernel gives all its results the format of its input, whatever is between them.
                    marked.update(n for n in region.nodes if not is_size(n))
        for node in program.graph.nodes:
            node.meta.pop("channels_last", None)
        for node in marked:
            node.meta["channels_last"] = True
        convolutions = sum(is_convolution(program, node) for node in marked)
        return f"{len(marked)} values around {convolutions} convolutions may be channels-last"


def _may_be_channels_last(program: StepProgram, node: Node, marked: set[Node], following: dict[str, object]) -> bool:
    if node in marked or is_convolution(program, node):
        return True
    if is_size(node):
        return False  # a number or a dtype, though one of an image
    if node.op == "placeholder":
        return following.get(node.name) in marked
    return takes_any_layout(program, node) and any(operand in marked for operand in node.all_input_nodes)
