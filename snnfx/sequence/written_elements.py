"""Forward an element that was just written to its reader: `out[:, t] = y`, then `out[:, t]`."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from snnfx.ir.facts import ITERATIONS
from snnfx.ops.step_functions import set_part

__all__ = ["forward_written_elements"]


def forward_written_elements(graph: fx.Graph) -> str:
    """Replace reads of the part that the same iteration has just written; return a note."""
    count = 0
    for node in list(graph.nodes):
        if node.target is not operator.getitem or not isinstance(node.args[0], Node):
            continue
        write, index = node.args[0], node.args[1]
        if write.target is not set_part or not _is_same_part(write.args[1], index):
            continue
        # A later loop that reads all elements must read them alike.
        if ITERATIONS.of(write) != ITERATIONS.of(node):
            continue
        written, read = write.args[2], node.meta.get("val")
        if _has_equal_type(written, read):
            node.replace_all_uses_with(written)
            graph.erase_node(node)
            count += 1
    return f"forwarded {count} written elements"


def _is_same_part(a: Any, b: Any) -> bool:
    """Whether two indices without tensors are equal."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_is_same_part, a, b))
    return type(a) is type(b) and (isinstance(a, int | slice) or a is None or a is Ellipsis) and bool(a == b)


def _has_equal_type(written: Any, read: Any) -> bool:
    """Whether the tensor holds the written value as it is: without a broadcast or a cast."""
    value = written.meta.get("val") if isinstance(written, Node) else None
    return (
        isinstance(value, Tensor)
        and isinstance(read, Tensor)
        and (value.shape, value.dtype, value.device) == (read.shape, read.dtype, read.device)
    )
