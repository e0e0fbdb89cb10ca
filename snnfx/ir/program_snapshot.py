"""Snapshots of a step program: cheap records for the history, to find changes, and to put a program back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.fx import Node

from snnfx.ir.guards import Guards
from snnfx.ir.program import StepProgram
from snnfx.ir.serialization import pack_program, unpack_program

__all__ = ["ProgramSnapshot"]

_PARTS = {
    "slots": ("slots",),
    "inputs": ("input_leaves", "input_spec"),
    "outputs": ("output_spec",),
}
"""Parts of a program that passes declare to change -> its fields."""


@dataclass(frozen=True)
class _Row:
    node: Node
    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    meta: dict[str, Any]


class ProgramSnapshot:
    """The graph, regions and fields of a program at one time.

    A snapshot refers to the nodes and does not copy the graph, so it takes microseconds; `rebuild` makes a program.
    """

    def __init__(self, program: StepProgram) -> None:
        self.source = program.source
        self.rows = [_Row(n, n.name, n.op, n.target, n.args, n.kwargs, dict(n.meta)) for n in program.graph.nodes]
        fields = {k: v for k, v in vars(program).items() if k not in ("graph", "source", "regions", "first_step")}
        self.fields: dict[str, Any] = {k: copy.copy(v) if isinstance(v, dict | list) else v for k, v in fields.items()}
        self.regions = [replace(r, nodes=list(r.nodes), slots=list(r.slots)) for r in program.regions]
        self.first_step = ProgramSnapshot(program.first_step) if program.first_step is not None else None
        self._packed: Any = None

    def rebuild(self) -> StepProgram:
        """A program with a graph of its own, as it was at the time of the snapshot."""
        if self._packed is not None:
            return unpack_program(self._packed, self.source)
        graph = fx.Graph()
        new: dict[Node, Node] = {}
        for row in self.rows:
            args = fx.node.map_arg(row.args, new.__getitem__)
            kwargs = fx.node.map_arg(row.kwargs, new.__getitem__)
            node = graph.create_node(row.op, row.target, args, kwargs, name=row.name)
            node.name, node.meta = row.name, dict(row.meta)
            new[row.node] = node
        fields: dict[str, Any] = {k: copy.copy(v) if isinstance(v, dict | list) else v for k, v in self.fields.items()}
        regions = [replace(r, nodes=[new[n] for n in r.nodes if n in new], slots=list(r.slots)) for r in self.regions]
        first = self.first_step.rebuild() if self.first_step is not None else None
        return StepProgram(graph=graph, source=self.source, regions=regions, first_step=first, **fields)

    def restore(self, program: StepProgram) -> None:
        """Put a program back to the time of the snapshot; its graph is a new one."""
        program.__dict__.update(vars(self.rebuild()))

    def changed_nodes(self, program: StepProgram) -> list[Node]:
        """The nodes of a program that are new, or have another target or other operands."""
        rows = {row.node: row for row in self.rows}
        return [n for n in program.graph.nodes if n not in rows or _is_changed(rows[n], n)]

    def graph_changed(self, program: StepProgram) -> bool:
        """Whether the graph has other nodes, or the same nodes in another order."""
        nodes = list(program.graph.nodes)
        return [row.node for row in self.rows] != nodes or bool(self.changed_nodes(program))

    def changed_parts(self, program: StepProgram) -> Iterator[str]:
        """The parts of a program that have changed, by the names that a pass declares."""
        if self.graph_changed(program):
            yield "graph"
        for part, names in _PARTS.items():
            if any(getattr(program, name) != self.fields[name] for name in names):
                yield part
        if self._region_rows(self.regions) != self._region_rows(program.regions):
            yield "regions"

    def changed_fields(self, program: StepProgram) -> Iterator[str]:
        """The fields of a program that have changed, of those that no pass may change."""
        if program.source is not self.source:
            yield "source"
        free = ("constants", "guards", *(name for names in _PARTS.values() for name in names))
        for name, before in self.fields.items():
            if name not in free and not _is_same_field(before, getattr(program, name)):
                yield name
        constants, now = self.fields["constants"], program.constants
        if any(now.get(name) is not value for name, value in constants.items()):
            yield "constants"
        if (self.first_step is None) != (program.first_step is None):
            yield "first_step"

    @staticmethod
    def _region_rows(regions: Any) -> list[Any]:
        return [(r.name, r.kind, r.nodes, r.slots, r.lowering_refusal, r.absorbed) for r in regions]

    def on(self, source: nn.Module) -> ProgramSnapshot:
        """The same snapshot for a copy of the model."""
        other = copy.copy(self)
        other.source = source
        other.first_step = self.first_step.on(source) if self.first_step is not None else None
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Guards refer to objects outside the model, and no picture shows them.
        packed = self._packed
        if packed is None:
            program = self.rebuild()
            program.guards = Guards()
            if program.first_step is not None:
                program.first_step.guards = Guards()
            packed = pack_program(replace(program, initial_attributes=[]))
        return {"source": self.source, "_packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, rows=[], fields={}, regions=[], first_step=None)


def _is_same_field(before: Any, now: Any) -> bool:
    """Whether a field is the same; elements of lists and dictionaries by identity."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(now[key] is value for key, value in before.items())
    return before is now or (type(before) is type(now) and bool(before == now))


def _is_changed(row: _Row, node: Node) -> bool:
    if row.op != node.op or (row.target is not node.target and row.target != node.target):
        return True
    return not (_is_same(row.args, node.args) and _is_same(row.kwargs, node.kwargs))


def _is_same(a: Any, b: Any) -> bool:
    """Whether arguments are the same, nodes by identity."""
    if a is b:
        return True
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return [*a] == [*b] and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _is_same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return type(a) is type(b) and not isinstance(a, Node) and bool(a == b)
