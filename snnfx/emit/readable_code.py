"""An emitted graph as Python code for people: short names, one statement for each region.

FX's own code fetches each attribute in a statement of its own, under its whole path, and deletes each value after its
last use. This code reads attributes where they are used and takes elements of tuples at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from snnfx.emit.emitted_graphs import REGIONS

__all__ = ["readable_code"]

_WIDTH = 100
_INDENT = "    "


def readable_code(graph: Graph, root: nn.Module) -> str:
    """The code of a function `forward(self, ...)` that computes a graph.

    Functions of snnfx have their plain names; `regions` is the module that contains the regions.

    Args:
        graph: the graph.
        root: the module that its targets refer to. Layers of a `Sequential` are read by index, those of the model
            itself through `self.source`.
    """
    return _Writer(graph, root).code()


class _Writer:
    def __init__(self, graph: Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.texts: dict[Node, str] = {}
        functions = {_name_of_function(n.target) for n in graph.nodes if n.op == "call_function"}
        self.names: set[str] = {"self", "regions", *functions}
        targets = [str(n.target) for n in graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{REGIONS}.")]
        containers = {target.rpartition(".")[0] for target in targets}
        self.regions = containers.pop() if len(containers) == 1 else ""

    def code(self) -> str:
        parameters, lines = ["self"], []
        if self.regions:
            lines.append(f"regions = self.{self.regions}")
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.texts[node] = name = self._new_name(node)
                parameters.append(name + (f"={node.args[0]!r}" if node.args else ""))
            elif node.op == "get_attr":
                self.texts[node] = self._attribute(str(node.target))
            elif node.op == "output":
                lines += self._wrapped("return ", node.args[0], "")
            elif node not in self.texts:
                if _is_element(node):
                    self.texts[node] = f"{self._text(node.args[0])}[{node.args[1]!r}]"
                else:
                    lines += self._statement(node)
        body = "\n".join(_INDENT + line for line in lines)
        return f"def forward({', '.join(parameters)}):\n{body}\n"

    def _new_name(self, node: Node) -> str:
        """The name of a node, with a number if a function or another value has it."""
        name, number = node.name, 2
        while name in self.names:
            name, number = f"{node.name}_{number}", number + 1
        self.names.add(name)
        return name

    def _statement(self, node: Node) -> list[str]:
        function, arguments = self._call(node)
        name = self._new_name(node)
        elements, last = "", node
        # The only element of a tuple that is used is taken at once.
        while len(last.users) == 1 and _is_element(following := next(iter(last.users))):
            elements += f"[{following.args[1]!r}]"
            last = following
        taken = node
        while taken is not last:
            taken = next(iter(taken.users))
            self.texts[taken] = name
        self.texts[node] = name
        start = f"{name} = {function}("
        line = f"{start}{', '.join(key + self._text(value) for key, value in arguments)}){elements}"
        if len(line) + len(_INDENT) <= _WIDTH:
            return [line]
        inside = [part for key, value in arguments for part in self._wrapped(key, value, ",")]
        return [start, *(_INDENT + part for part in inside), f"){elements}"]

    def _wrapped(self, start: str, value: Any, end: str) -> list[str]:
        """A value on one line, or each of its elements on a line of its own."""
        line = f"{start}{self._text(value)}{end}"
        if len(line) + 2 * len(_INDENT) <= _WIDTH or not isinstance(value, tuple | Mapping):
            return [line]
        if isinstance(value, tuple):
            parts, brackets = [("", item) for item in value], "()"
        else:
            parts, brackets = [(f"{self._text(key)}: ", item) for key, item in value.items()], "{}"
        inside = [part for key, item in parts for part in self._wrapped(key, item, ",")]
        return [f"{start}{brackets[0]}", *(_INDENT + part for part in inside), f"{brackets[1]}{end}"]

    def _call(self, node: Node) -> tuple[str, list[tuple[str, Any]]]:
        """The called function, and its arguments with `name=` before keyword arguments."""
        arguments = [("", argument) for argument in node.args]
        if node.op == "call_method":
            function, arguments = f"{self._text(node.args[0])}.{node.target}", arguments[1:]
        elif node.op == "call_module":
            function = self._attribute(str(node.target))
        else:
            function = _name_of_function(node.target)  # type: ignore[arg-type]
        return function, arguments + [(f"{name}=", value) for name, value in node.kwargs.items()]

    def _attribute(self, target: str) -> str:
        if self.regions and target.startswith(f"{self.regions}."):
            text, target = "regions", target.removeprefix(f"{self.regions}.")
        else:
            text = "self"
        owner: Any = self.root if text == "self" else None
        for name in target.split("."):
            if owner is self.root and isinstance(source := getattr(owner, "source", None), nn.Sequential):
                indexed, through = source, "self.source"
            else:
                indexed, through = owner, text
            if _is_index(indexed, name):
                text = f"{through}[{name}]"
            else:
                text = f"{text}.{name}" if name.isidentifier() else f"getattr({text}, {name!r})"
            owner = getattr(owner, name, None)
        return text

    def _text(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.texts[value]
        if isinstance(value, tuple):
            return f"({', '.join(map(self._text, value))}{',' * (len(value) == 1)})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{self._text(k)}: {self._text(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        return repr(value)


def _is_index(owner: Any, name: str) -> bool:
    """Whether a child of a container is reached by its index."""
    is_list = isinstance(owner, nn.Sequential | nn.ModuleList) and name.isdigit() and int(name) < len(owner)
    return is_list and owner[int(name)] is getattr(owner, name, None)


def _is_element(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int | str)


def _name_of_function(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", str(function))
    module = getattr(function, "__module__", None) or ""
    if module.startswith("snnfx.") or module == "builtins":
        return str(name)
    prefix = {"_operator": "operator", "": "torch", "torch._C._nn": "torch.nn.functional"}.get(module, module)
    return f"{prefix}.{name}"
