"""What the program of a converted net says about its model: where a module or an output is, how a state begins."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.program import SELF_TARGET, is_module_call, place_of

__all__ = ["called_in", "is_within", "place_of_module", "place_of_output", "reset_discovered_state"]


def called_in(net: Any, kinds: Set[str]) -> set[str]:
    """The qualified names of the modules called in regions of these kinds."""
    nodes = (node for region in net.regions if region.kind in kinds for node in region.nodes)
    return {name for name in map(_called_by, nodes) if name is not None}


def is_within(name: str, parents: Set[str]) -> bool:
    """Whether a module is one of these modules or inside one."""
    return any(name == parent or not parent or name.startswith(parent + ".") for parent in parents)


def place_of_module(net: Any, name: str) -> str:
    """The first region that calls a module, or "" where none is known to."""
    return _place(net, (node for region in net.regions for node in region.nodes if _called_by(node) == name))


def place_of_output(net: Any, index: int) -> str:
    """The region that computes output number `index` of the flattened outputs, or "" where it is not known."""
    outputs = net.program.outputs if hasattr(net, "program") else ()
    return _place(net, [node for node in outputs[index : index + 1] if isinstance(node, Node)])


def reset_discovered_state(model: nn.Module, net: Any) -> None:
    """Give the attributes that capture found to be state the value they had then; `reset_net` does not know them."""
    program = getattr(net, "program", None)
    if program is None:
        return
    for slot, initial in zip(program.slots, program.initial_values, strict=True):
        if slot.discovered:
            path, _, attribute = slot.name.rpartition(".")
            module = model.get_submodule(path)
            now = getattr(module, attribute)
            if isinstance(initial, Node) and initial.op == "get_attr":
                initial = program.resolve(str(initial.target))
            elif isinstance(initial, Node):
                # The step computes its first value itself, where it finds none.
                initial = None if isinstance(now, Tensor) else now
            if isinstance(initial, Tensor):
                initial = initial.detach().to(now if isinstance(now, Tensor) else initial, copy=True)
            setattr(module, attribute, initial)


def _called_by(node: Node) -> str | None:
    if node.op == "call_module":
        return str(node.target)
    if not is_module_call(node):
        return None
    target = str(node.args[0].target)  # type: ignore[union-attr]
    return "" if target == SELF_TARGET else target


def _place(net: Any, nodes: Iterable[Node]) -> str:
    for node in nodes:
        for region in net.regions:
            if node in region.nodes:
                return ", ".join(filter(None, [f"region `{region.name}` ({region.kind})", place_of(node)]))
    return ""
