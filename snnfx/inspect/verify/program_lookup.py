"""Look up regions of modules and outputs, and states by qualified name, in the program of a net."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.ir.facts import MODULE
from snnfx.ir.nodes import is_module_call
from snnfx.ir.printing import location_of
from snnfx.ir.program import SELF_TARGET
from snnfx.ops.operator_lookup import operation_of

__all__ = ["called_in", "is_within", "normalized_in", "region_of_module", "region_of_output", "value_at"]


def called_in(net: Any, kinds: Set[str]) -> set[str]:
    """The qualified names of the modules called in regions of these kinds."""
    nodes = (node for region in net.regions if region.kind in kinds for node in region.nodes)
    return {name for name in map(_called_by, nodes) if name is not None}


def normalized_in(net: Any, kinds: Set[str]) -> set[str]:
    """The qualified names of the modules whose traced code calls `torch.nn.functional.batch_norm` in such regions."""
    nodes = (node for region in net.regions if region.kind in kinds for node in region.nodes)
    return {str(MODULE.of(node)) for node in nodes if operation_of(node) == "batch_norm"}


def is_within(name: str, parents: Set[str]) -> bool:
    """Whether a module is one of these modules or inside one."""
    return any(name == parent or not parent or name.startswith(parent + ".") for parent in parents)


def region_of_module(net: Any, name: str) -> str:
    """The first region that calls a module, with the user's file and line; "" if unknown."""
    return _location(net, (node for region in net.regions for node in region.nodes if _called_by(node) == name))


def region_of_output(net: Any, index: int) -> str:
    """The region that computes output number `index` of the flattened outputs; "" if unknown."""
    outputs = net.program.outputs if hasattr(net, "program") else ()
    return _location(net, [node for node in outputs[index : index + 1] if isinstance(node, Node)])


def value_at(model: nn.Module, name: str) -> tuple[Any, ...]:
    """The value of an attribute, or of an element of a container in it, by the name of its slot; () if absent."""
    value: Any = model
    for atom in name.split("."):
        if isinstance(value, nn.Module):
            members: Any = {a: getattr(value, a) for a in (atom,) if hasattr(value, a)}
        elif isinstance(value, Mapping):
            members = {str(key): item for key, item in value.items()}
        elif isinstance(value, Sequence) or hasattr(value, "maxlen"):
            members = {str(key): item for key, item in enumerate(value)}
            members |= dict(zip(getattr(value, "_fields", ()), value, strict=False))
        else:
            members = {}
        if atom not in members:
            return ()
        value = members[atom]
    return (value,)


def _called_by(node: Node) -> str | None:
    if node.op == "call_module":
        return str(node.target)
    if not is_module_call(node):
        return None
    target = str(node.args[0].target)  # type: ignore[union-attr]
    return "" if target == SELF_TARGET else target


def _location(net: Any, nodes: Iterable[Node]) -> str:
    for node in nodes:
        for region in net.regions:
            if node in region.nodes:
                return ", ".join(filter(None, [f"region `{region.name}` ({region.kind})", location_of(node)]))
    return ""
