"""Print nodes: descriptions for messages, source locations, lines of IR."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import Node

from snnfx.ir.facts import KIND, MODULE, SLOT, VALUE, WHERE
from snnfx.ir.nodes import is_module_call
from snnfx.sandbox.user_code import format_location

__all__ = ["describe_node", "format_graph", "format_node", "location_of", "operation_name", "text_of_value"]


def location_of(node: Node) -> str:
    """The user's source line of a node, `file.py:41`; "" if unknown."""
    return format_location(WHERE.of(node))


def describe_node(node: Node) -> str:
    """A node in messages: the qualified name of the called module, or the operation and its module."""
    module = MODULE.of(node)
    if node.op == "call_module":
        return str(node.target)
    if is_module_call(node):
        return module or "the model"
    name = operation_name(node)
    return f"{name} in {module}" if module else name


def operation_name(node: Node) -> str:
    """The name of the operation of a node without underscores, e.g. "add" or "flatten"."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.strip("_")


def format_node(node: Node) -> str:
    """One line of IR: name, operation, arguments, shape of one step, region kind, source line."""
    if node.op == "output":
        text = f"return {node.args[0]}"
    elif node.op == "placeholder":
        slot = SLOT.of(node)
        text = f"{node.name} = {'slot ' + slot if slot else 'input'}"
    elif node.op == "get_attr":
        text = f"{node.name} = self.{node.target}"
    else:
        arguments = ", ".join([*(str(a) for a in node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        called = f"self.{node.target}" if node.op == "call_module" else operation_name(node)
        text = f"{node.name} = {called}({arguments})"
    notes = [text_of_value(VALUE.of(node))]
    if KIND.of(node):
        notes.append(str(KIND.of(node)))  # an illegal value is printed in the message that refuses it
    if location_of(node):
        notes.append(location_of(node))
    notes = [note for note in notes if note]
    return f"{text}    # {', '.join(notes)}" if notes else text


def format_graph(graph: fx.Graph) -> str:
    """The lines of IR of a graph."""
    return "\n".join(map(format_node, graph.nodes))


def text_of_value(value: Any) -> str:
    """Shape and dtype of an example value, e.g. "[2, 64, 28, 28] float32"."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return ""
