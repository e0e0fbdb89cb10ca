"""Forward elements that a loop writes to those that read them: `out[t] = y; z = f(out[t])` reads `y`."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import VALUE
from snnfx.ir.nodes import is_structural
from snnfx.ir.program import StepProgram
from snnfx.ops.step_functions import set_part

__all__ = ["forward_written_elements"]


def forward_written_elements(program: StepProgram) -> str:
    """Replace reads of elements by the values that were written there; return a note."""
    forwarded = 0
    for node in list(program.graph.nodes):
        if node.target is not operator.getitem or is_structural(node) or not isinstance(node.args[0], Node):
            continue
        read = _element(node.args[0], node.args[1])
        source, written = node.args[0], None
        while read is not None and source.target is set_part:
            tensor, index, value = source.args
            written = _element(source, index)
            if written is None or written[0] != read[0] or written == read or (written[1] < 0) is not (read[1] < 0):
                break
            source = tensor  # type: ignore[assignment]
        if read is None or written is None:
            continue
        if written != read:
            node.args = (source, node.args[1])  # no write in between changes the element
        elif _replaces(value, node):
            node.replace_all_uses_with(value)
            program.graph.erase_node(node)
            forwarded += 1
    for node in reversed(list(program.graph.nodes)):
        if node.target is set_part and not node.users:
            program.graph.erase_node(node)  # only reads of elements needed it
    return f"forwarded {forwarded} elements"


def _element(source: Node, index: Any) -> tuple[int, int] | None:
    """`(dimension, index)` of the one element that an index selects: `x[t]`, `x[:, t]`, `x[..., t]`."""
    value = VALUE.of(source)
    entries = index if isinstance(index, tuple) else (index,)
    places = [i for i, e in enumerate(entries) if isinstance(e, int) and not isinstance(e, bool)]
    if not isinstance(value, Tensor) or len(places) != 1:
        return None
    place = places[0]
    others = (e for i, e in enumerate(entries) if i != place)
    if not all(e is Ellipsis or (isinstance(e, slice) and e == slice(None)) for e in others):
        return None
    dim = value.dim() - len(entries) + place if Ellipsis in entries[:place] else place
    return dim, entries[place]


def _replaces(value: Any, read: Node) -> bool:
    """Whether a written value is what a read of it returns."""
    if not isinstance(value, Node):
        return False
    a, b = VALUE.of(value), VALUE.of(read)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
