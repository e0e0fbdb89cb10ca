"""Compile an FX graph into a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from snnfx.sandbox.torch_internals import function_from_source


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """A function that runs a graph; its first argument is the module that `get_attr` targets refer to."""
    code = graph.python_code(root_module="self")
    return function_from_source(code.src, code.globals, {})
