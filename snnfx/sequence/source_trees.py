"""The loops and functions in the source code of a file."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator

from snnfx.capture.iteration_tracking import FunctionKey, LoopSource

__all__ = ["Function", "Loop", "definition_of", "loop_at", "nodes_of", "parameter_of", "parsed"]


@functools.lru_cache(maxsize=64)
def parsed(filename: str) -> ast.Module | None:
    """The syntax tree of a file; None if its source cannot be read."""
    """The syntax tree of a file; None if its source cannot be read."""
    lines = linecache.getlines(filename)
    try:
        return ast.parse("".join(lines)) if lines else None
    except SyntaxError:
        return None


Loop = ast.For | ast.While | ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


def loop_at(tree: ast.Module, source: LoopSource) -> Loop | None:
    """The innermost loop that the first instruction of the loop belongs to."""
    found: Loop | None = None
    for node in ast.walk(tree):
        if not isinstance(node, Loop) or not _contains(node, source.line, source.column):
            continue
        if found is None or (node.lineno, node.col_offset) >= (found.lineno, found.col_offset):
            found = node
    return found


def _contains(node: Loop, line: int, column: int) -> bool:
    start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    return start <= (line, column) <= end


Function = ast.FunctionDef | ast.AsyncFunctionDef


def definition_of(function: FunctionKey) -> Function | None:
    """The definition of a function; None if its source cannot be read."""
    filename, name, line = function
    tree = parsed(filename)
    for node in ast.walk(tree) if tree is not None else ():
        if not isinstance(node, Function) or node.name != name:
            continue
        if line in (node.lineno, *(d.lineno for d in node.decorator_list)):
            return node
    return None


def _is_bound(function: FunctionKey, definition: Function) -> bool:
    """Whether the first parameter is the object or class of a method."""
    if any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in definition.decorator_list):
        return False
    tree = parsed(function[0])
    classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)] if tree is not None else []
    return any(definition in c.body for c in classes)


def parameter_of(function: FunctionKey, definition: Function, call: ast.Call, argument: ast.AST) -> str | None:
    """The parameter of a function that an argument of a call is bound to; None if that is not certain."""
    if any(isinstance(a, ast.Starred) for a in call.args) or definition.args.vararg is not None:
        return None
    positional = [a.arg for a in (*definition.args.posonlyargs, *definition.args.args)]
    for keyword in call.keywords:
        if keyword is argument or keyword.value is argument:
            known = {*positional, *(a.arg for a in definition.args.kwonlyargs)}
            return keyword.arg if keyword.arg in known else None
    if _is_bound(function, definition):
        positional = positional[1:]
    place = next((i for i, a in enumerate(call.args) if a is argument), len(positional))
    return positional[place] if place < len(positional) else None


def nodes_of(trees: list[ast.AST]) -> Iterator[ast.AST]:
    """All nodes of some code."""
    for tree in trees:
        yield from ast.walk(tree)
