"""Find the layers that may read the spikes of a loop as bits."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from snnfx.functional import multi_step_forward, seq_to_ann_forward
from snnfx.lowering.choices.image_formats import fastest_format
from snnfx.lowering.events.event_layers import call_layer_by_events
from snnfx.lowering.events.spike_readers import SpikeReader
from snnfx.ops.memory_format import image_format, row_major
from snnfx.ops.sequence_functions import call_module
from snnfx.regions.sequence_region import RegionGraph

__all__ = ["BitReaders", "find_readers"]


@dataclass(frozen=True)
class BitReaders:
    """The layers that may read spikes as bits.

    Args:
        of_loop: for each call of a loop, the readers of its only output: all of them take bits.
        of_fold: for each call of a fold, the reader at its start.
        flattens: for each of these folds, the flattening modules before the reader.
    """

    of_loop: Mapping[Node, Sequence[SpikeReader]]
    of_fold: Mapping[Node, SpikeReader]
    flattens: Mapping[Node, Sequence[nn.Flatten]]


def find_readers(graph: fx.Graph, root: nn.Module, skipped: Collection[Node] = ()) -> BitReaders:
    """The loops from the reset state whose output only layers read that take bits, with these layers.

    Args:
        graph: an emitted graph.
        root: the module that its targets refer to.
        skipped: calls of loops that write numbers in any case.
    """
    of_loop: dict[Node, list[SpikeReader]] = {}
    of_fold: dict[Node, _Reader] = {}
    for loop in graph.nodes:
        if loop.target is multi_step_forward and loop.kwargs.get("state") is None and loop not in skipped:
            found = _readers_of(loop, root)
            of_fold |= found
            of_loop[loop] = [reader.reader for reader in found.values()]
    return BitReaders(
        of_loop,
        {fold: found.reader for fold, found in of_fold.items()},
        {fold: found.flattens for fold, found in of_fold.items()},
    )


@dataclass(frozen=True)
class _Reader:
    reader: SpikeReader
    flattens: list[nn.Flatten]


def _readers_of(loop: Node, root: nn.Module) -> dict[Node, _Reader]:
    """The readers of the output of a loop, by fold; none unless all of them take bits."""
    outputs = [n for n in loop.users if n.args[1] == 0 and n.target is operator.getitem]
    values = [value for n in outputs for value in n.users]
    if len(values) != 1 or values[0].target is not operator.getitem or values[0].args[1] != 0:
        return {}
    found: dict[Node, _Reader] = {}
    for fold in values[0].users:
        reader = _reader_of(fold, root) if fold.target is seq_to_ann_forward else None
        if reader is None or len(fold.args[0]) != 1:  # type: ignore[arg-type]
            return {}
        found[fold] = reader
    return found


def _reader_of(fold: Node, root: nn.Module) -> _Reader | None:
    """The layer at the start of a folded region, behind poolings and a flattening that bits have as well."""
    region = _module_at(root, fold.args[1])
    if region is None or type(region).__mro__[1] is not RegionGraph or not set(fold.kwargs) <= {"constants"}:
        return None
    placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
    constants: Any = fold.kwargs.get("constants", ())
    modules = {p: _module_at(root, c) for p, c in zip(placeholders, constants, strict=False)}
    value, pools, flattens, is_flat = placeholders[-1], list[nn.Module](), list[nn.Flatten](), False
    while len(value.users) == 1:
        (n,) = value.users
        if n.target in (image_format, fastest_format, row_major) and n.args[0] is value:
            pass
        elif n.target is call_layer_by_events and n.args[1] is value:
            layer = modules.get(n.args[0])
            return None if layer is None else _Reader(SpikeReader(layer, pools, is_flat), flattens)
        elif n.target is call_module and n.args[1:] == (value,) and not is_flat:
            module = modules.get(n.args[0])
            if type(module) is nn.MaxPool2d:
                pools.append(module)
            elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
                flattens.append(module)
                is_flat = True
            else:
                return None
        elif n.target in ("flatten", torch.flatten) and n.args == (value, 1) and not n.kwargs:
            is_flat = True
        else:
            return None
        value = n
    return None


def _module_at(root: nn.Module, node: Any) -> Any:
    """The module that an attribute of the graph refers to; None if it is not one."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    owner: Any = root
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    return owner if isinstance(owner, nn.Module) else None
