"""Copy and pickle a net: its step programs as plain records, and its model.

Pickling a `torch.fx.Graph` would lose the names and `meta` of nodes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.nn import functional

from snnfx.ir.facts import SITE
from snnfx.ir.program import Region, StepProgram
from snnfx.ir.sites import new_site
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import named_stateful

__all__ = ["copy_model", "pack_program", "pack_programs", "unpack_program", "unpack_programs"]


@dataclass(frozen=True)
class _PackedNode:
    """A reference to a node in packed arguments."""

    name: str


@dataclass(frozen=True)
class _Functional:
    """A reference to a function that torch.nn.functional creates at import, such as max_pool2d."""

    name: str


def _packed(target: Any) -> Any:
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    return next((_Functional(name) for name, value in vars(functional).items() if value is target), target)


@dataclass(frozen=True)
class _PackedProgram:
    nodes: list[tuple[str, str, Any, Any, Any, dict[str, Any]]]
    regions: list[tuple[str, str, list[str], list[str], str | None, tuple[str, ...]]]
    fields: dict[str, Any]
    first_step: _PackedProgram | None


_REBUILT = ("graph", "source", "regions", "first_step")
_SPECS = ("input_spec", "output_spec")


def pack_program(program: StepProgram) -> _PackedProgram:
    """A picklable record of a program without its model."""

    def pack(value: Any) -> Any:
        return _PackedNode(value.name) if isinstance(value, Node) else value

    nodes = [
        (n.name, n.op, _packed(n.target), map_aggregate(n.args, pack), map_aggregate(n.kwargs, pack), dict(n.meta))
        for n in program.graph.nodes
    ]
    regions = [
        (r.name, r.kind, [n.name for n in r.nodes], list(r.slots), r.lowering_refusal, r.absorbed)
        for r in program.regions
    ]
    fields = {k: v for k, v in vars(program).items() if k not in _REBUILT}
    for name in _SPECS:
        # Store a tree structure as a nested container of zeros: pickling of TreeSpec is deprecated.
        fields[name] = pytree.tree_unflatten([0] * fields[name].num_leaves, fields[name])
    fields["guards"] = program.guards.packed(program.source)
    first = pack_program(program.first_step) if program.first_step is not None else None
    return _PackedProgram(nodes, regions, fields, first)


def unpack_program(packed: _PackedProgram, source: nn.Module) -> StepProgram:
    """Rebuild a program on the model `source`."""
    graph = fx.Graph()
    nodes: dict[str, Node] = {}

    def unpack(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _PackedNode) else value

    for name, op, target, args, kwargs, meta in packed.nodes:
        target = getattr(functional, target.name) if isinstance(target, _Functional) else target
        node = graph.create_node(op, target, map_aggregate(args, unpack), map_aggregate(kwargs, unpack), name=name)
        node.name = name
        node.meta = dict(meta)
        if SITE.is_known(node):
            SITE.set(node, new_site())  # decisions of the packed program are not those of this one
        nodes[name] = node
    fields = {**packed.fields, **{name: pytree.tree_structure(packed.fields[name]) for name in _SPECS}}
    fields["guards"] = packed.fields["guards"].unpacked(source)
    program = StepProgram(graph=graph, source=source, **fields)
    regions = [Region(r[0], r[1], [nodes[n] for n in r[2]], *r[3:]) for r in packed.regions]
    first = unpack_program(packed.first_step, source) if packed.first_step is not None else None
    return replace(program, regions=regions, first_step=first)


def pack_programs(programs: Mapping[bool, StepProgram]) -> tuple[Any, ...]:
    """The records of the programs of both modes; a program shared by both modes stays shared."""
    training, evaluation = programs[True], programs[False]
    return pack_program(training), None if evaluation is training else pack_program(evaluation)


def unpack_programs(packed: tuple[Any, ...], source: nn.Module) -> dict[bool, StepProgram]:
    """Rebuild the programs of both modes on the model `source`."""
    training = unpack_program(packed[0], source)
    return {True: training, False: training if packed[1] is None else unpack_program(packed[1], source)}


def copy_model(source: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a model; state that has an autograd graph (from a training step) is detached."""
    for _, module, adapter in named_stateful(source):
        for value in adapter.read(module):
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(source, memo)
