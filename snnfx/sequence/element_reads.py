"""Sequences from the values that the iterations read: `x[t]`, `x[:, t]`, `x.unbind()`, reversed, with an offset."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.ir.facts import VALUE
from snnfx.ir.nodes import is_structural
from snnfx.ir.printing import operation_name
from snnfx.ops.elements import read_elements

__all__ = ["ElementRead", "arithmetic_progression", "common_index", "common_read", "read_sequence", "record_call"]


@dataclass(frozen=True)
class ElementRead:
    """Reads of the elements `start`, `start + step`, ... of one dimension, one in each iteration.

    Args:
        source: the tensor.
        dim: the dimension.
        start, step, count: the elements.
        keeps_dim: whether an element has the dimension, with size 1: `x[t : t + 1]`.
        index: the whole index of one element, for `x[:, t, :, 0]`; None: it has only full slices.
        position: the position of the element in `index`.
    """

    source: Node
    dim: int
    start: int
    step: int
    count: int
    keeps_dim: bool = False
    index: tuple[Any, ...] | None = None
    position: int = 0


def arithmetic_progression(values: Sequence[Any]) -> tuple[int, int] | None:
    """`(start, step)` of integers with equal differences."""
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values) or len(values) < 2:
        return None
    step = values[1] - values[0]
    return (values[0], step) if all(b - a == step for a, b in itertools.pairwise(values)) else None


def common_read(nodes: Sequence[Node]) -> ElementRead | None:
    """The element reads that these nodes are, one for each iteration; None for other values."""
    first = nodes[0]
    if any((n.op, n.target) != (first.op, first.target) or n.kwargs != first.kwargs for n in nodes):
        return None
    source = first.args[0] if first.args else None
    if not isinstance(source, Node) or any(not n.args or n.args[0] is not source for n in nodes):
        return None
    if first.target is operator.getitem:
        if is_structural(first):
            return None
        indices = [n.args[1] for n in nodes]
        parts = _parts_of(source)
        if parts is not None:
            part_of, dim, keeps_dim = parts
            return _read(part_of, dim, indices, keeps_dim)
        value = VALUE.of(source)
        return _read_by_index(source, indices) if isinstance(value, Tensor) else None
    if operation_name(first) == "select" and len(first.args) == 3 and not first.kwargs:
        dims = {n.args[1] for n in nodes}
        return _read(source, dims.pop(), [n.args[2] for n in nodes]) if len(dims) == 1 else None
    return None


def _read(
    source: Node, dim: Any, indices: Sequence[Any], keeps_dim: bool = False, index: Any = None, position: int = 0
) -> ElementRead | None:
    progression = arithmetic_progression(indices)
    value = VALUE.of(source)
    if progression is None or not isinstance(dim, int) or not isinstance(value, Tensor):
        return None
    if progression[1] == 0:
        return None
    return ElementRead(source, dim % value.dim(), *progression, len(indices), keeps_dim, index, position)


def _parts_of(node: Node) -> tuple[Node, Any, bool] | None:
    """`(x, dim, keeps_dim)` of a node that returns the elements of one dimension: `x.unbind()`, `x.split(1)`."""
    name = operation_name(node)
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], Node):
        return None
    source, arguments = node.args[0], list(node.args[1:])
    if name == "unbind":
        return source, arguments[0] if arguments else node.kwargs.get("dim", 0), False
    if name not in ("split", "chunk", "tensor_split"):
        return None
    dim = arguments[1] if len(arguments) > 1 else node.kwargs.get("dim", 0)
    parts = VALUE.of(node)
    if not isinstance(dim, int) or not isinstance(parts, tuple | list):
        return None
    return (source, dim, True) if all(part.shape[dim] == 1 for part in parts) else None


def common_index(source: Node, indices: Sequence[Any]) -> tuple[int, int, int] | None:
    """`(dimension, start, step)` of indices that select one element of one dimension in each iteration."""
    read = _read_by_index(source, indices)
    return None if read is None or read.index is not None or read.keeps_dim else (read.dim, read.start, read.step)


def _read_by_index(source: Node, indices: Sequence[Any]) -> ElementRead | None:
    entries = [list(i) if isinstance(i, tuple) else [i] for i in indices]
    if len({len(e) for e in entries}) != 1:
        return None
    differing = [p for p in range(len(entries[0])) if any(e[p] != entries[0][p] for e in entries)]
    if len(differing) != 1:
        return None
    position = differing[0]
    others = [e for p, e in enumerate(entries[0]) if p != position]
    if not all(e is None or e is Ellipsis or isinstance(e, int | slice) for e in others) or any(
        isinstance(e, bool) for e in others
    ):
        return None
    chosen = [e[position] for e in entries]
    keeps_dim = isinstance(chosen[0], slice)
    if keeps_dim:
        if not all(
            isinstance(s, slice) and isinstance(s.start, int) and s.stop == s.start + 1 and s.step in (None, 1)
            for s in chosen
        ):
            return None
        chosen = [s.start for s in chosen]
    dims = VALUE.of(source).dim()
    before = entries[0][:position]
    if Ellipsis in before:
        after = [e for e in entries[0][position + 1 :] if e is not None]
        dim = dims - 1 - len(after)
    else:
        dim = sum(e is not None for e in before)
    is_plain = all(e is Ellipsis or e == slice(None) for e in others)
    if keeps_dim and not is_plain:
        return None
    return _read(source, dim, chosen, keeps_dim, None if is_plain else tuple(entries[0]), position)


def read_sequence(graph: fx.Graph, read: ElementRead) -> Node:
    """Record the sequence of the elements, time first, at the insertion point of the graph."""
    arguments = (read.source, read.dim, read.start, read.step, read.count)
    node = record_call(graph, read_elements, arguments)
    if read.index is not None:
        others = read.index[: read.position] + read.index[read.position + 1 :]
        node = record_call(graph, operator.getitem, (node, (slice(None), *others)))
    if read.keeps_dim:
        node = record_call(graph, torch.unsqueeze, (node, read.dim + 1))
    return node


def record_call(graph: fx.Graph, target: Any, args: tuple[Any, ...], **kwargs: Any) -> Node:
    """Record a call with its example value, at the insertion point of the graph."""
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg(args, lambda n: VALUE.of(n))
    VALUE.set(node, target(*values, **kwargs))
    return node
