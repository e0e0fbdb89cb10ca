"""Nodes as text: in the user's words, and as lines of IR."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch.fx import Node

from snnfx.ir.nodes import is_module_call

__all__ = ["describe_node", "format_node", "location_of", "operation_name", "text_of_value"]


def location_of(node: Node) -> str:
    """Where the user wrote the node: `file.py:41`, or "" when it has no line of the user's."""
    where = node.meta.get("where")
    if not where:
        return ""
    return f"{_short_path(where[0], os.getcwd())}:{where[1]}"


@functools.lru_cache(maxsize=256)
def _short_path(filename: str, folder: str) -> str:
    """The path from `folder`, or the last two parts of a path that leads elsewhere; asked for at each node."""
    relative = os.path.relpath(filename, folder)
    return relative if not relative.startswith("..") else os.path.join(*filename.split(os.sep)[-2:])


def describe_node(node: Node) -> str:
    """A node in the user's words: the qualified name of what it calls, or the operation and the module it is in."""
    module = node.meta.get("module", "")
    if node.op == "call_module":
        return str(node.target)
    if is_module_call(node):
        return module or "the model"
    name = operation_name(node)
    return f"{name} in {module}" if module else name


def operation_name(node: Node) -> str:
    """The bare name of the operation of a node, e.g. "add" or "flatten"."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.strip("_")


def format_node(node: Node) -> str:
    """One line of IR: name, operation, arguments, shape of one step, region, the user's line."""
    if node.op == "output":
        text = f"return {node.args[0]}"
    elif node.op == "placeholder":
        slot = node.meta.get("slot")
        text = f"{node.name} = {'slot ' + slot if slot else 'input'}"
    elif node.op == "get_attr":
        text = f"{node.name} = self.{node.target}"
    else:
        arguments = ", ".join([*(str(a) for a in node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
        called = f"self.{node.target}" if node.op == "call_module" else operation_name(node)
        text = f"{node.name} = {called}({arguments})"
    notes = [text_of_value(node.meta.get("val"))]
    if node.meta.get("kind"):
        notes.append(node.meta["kind"])
    if location_of(node):
        notes.append(location_of(node))
    notes = [note for note in notes if note]
    return f"{text}    # {', '.join(notes)}" if notes else text


def text_of_value(value: Any) -> str:
    """Shape and dtype of a recorded value, e.g. "[2, 64, 28, 28] float32"."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return ""
