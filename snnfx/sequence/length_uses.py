"""Find code that computes with `len(x)` such that calls of two lengths do not show its effect on others.

`len(x)` and `int(x.shape[0])` are numbers of Python: `if len(x) > 6` and `len(x) // 2` leave no trace in a graph, and
may give the same for both captured lengths. The source code of the function shows how it uses the number.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from snnfx.sequence.source_trees import parsed

__all__ = ["hides_length"]

_NUMBERS = ("len", "int")
_ROUNDING = frozenset({"min", "max", "round", "bool", "divmod", "int"})
_ALWAYS = {(ast.Gt, 0), (ast.GtE, 1), (ast.NotEq, 0)}
"""Comparisons that hold for every number of time steps."""


def hides_length(filename: str, line: int) -> bool:
    """Whether the function around a line computes with a length as a number, and may branch on it or round it.

    Args:
        filename, line: where the code asks for the number.
    """
    tree = parsed(filename)
    function = None if tree is None else _function_at(tree, line)
    if function is None:
        return False  # the source cannot be read
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    counters = set(_counters(function))
    stack = [n for n in ast.walk(function) if _is_number_of(n) and _is_at(n, line)]
    names: set[str] = set()
    while stack:
        node = stack.pop()
        if _is_hidden(node, parents, counters):
            return True
        for name in _assigned(node, parents) - names - counters:
            names.add(name)
            stack += [
                n
                for n in ast.walk(function)
                if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)
            ]
    return False


def _function_at(tree: ast.Module, line: int) -> ast.AST | None:
    """The innermost function around a line."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and _is_at(n, line)]
    return max(functions, key=lambda n: n.lineno, default=None)


def _is_at(node: ast.AST, line: int) -> bool:
    return bool(node.lineno <= line <= (node.end_lineno or node.lineno))  # type: ignore[attr-defined]


def _is_number_of(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NUMBERS


def _counters(function: ast.AST) -> Iterator[str]:
    """The variables of loops: comparing one with the length is a test for the last iteration."""
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension):
            yield from (n.id for n in ast.walk(node.target) if isinstance(n, ast.Name))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _reads(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def _is_hidden(node: ast.AST, parents: dict[ast.AST, ast.AST], counters: set[str]) -> bool:
    current: ast.AST = node
    while True:
        parent = parents.get(current)
        if isinstance(parent, ast.BinOp):
            if isinstance(parent.op, ast.FloorDiv | ast.Mod) and not _reads(parent, counters):
                return True
        elif isinstance(parent, ast.Compare):
            return not _reads(parent, counters) and not _holds_always(parent, current)
        elif isinstance(parent, ast.Call):
            name = getattr(parent.func, "id", "")
            return name in _ROUNDING and parent.func is not current and not _reads(parent, counters)
        elif not isinstance(parent, ast.UnaryOp):
            return False
        current = parent


def _holds_always(compare: ast.Compare, length: ast.AST) -> bool:
    if compare.left is not length or len(compare.ops) != 1 or not isinstance(compare.comparators[0], ast.Constant):
        return False
    return (type(compare.ops[0]), compare.comparators[0].value) in _ALWAYS


def _assigned(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> set[str]:
    """The variables that get a number computed from a node."""
    current = node
    while isinstance(parent := parents.get(current), ast.BinOp | ast.UnaryOp | ast.Tuple):
        current = parent
    if isinstance(parent, ast.Assign) and parent.value is current:
        return {n.id for target in parent.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    if isinstance(parent, ast.AnnAssign | ast.NamedExpr) and isinstance(parent.target, ast.Name):
        return {parent.target.id}
    return set()
