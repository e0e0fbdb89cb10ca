"""Recognise tests for the last iteration of a loop in its source code: `if t == x.shape[0] - 1`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping

__all__ = ["LoopLengths"]


class LoopLengths:
    """The expressions of the number of iterations of a loop.

    Args:
        tree: the code of the file.
        loop: the loop.
        bodies: the code of its iterations.
        targets: the loop variables and what they iterate over.
    """

    def __init__(
        self, tree: ast.AST, loop: ast.AST, bodies: Iterable[ast.AST], targets: Iterable[tuple[ast.AST, ast.AST]]
    ) -> None:
        self._values = _values_of_names(_function_around(tree, loop))
        self._changed = set(_assigned_names(bodies))
        found = (self._length(_iterated_length(target, iterated)) for target, iterated in targets)
        self._lengths = {length for length in found if length is not None}

    def is_test_of_end(self, counter: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> bool:
        """Whether a loop variable is compared with the number of the last iteration.

        A call of a single time step has a last iteration, but none before it.

        Args:
            counter: the loop variable, which counts from 0.
            parents: the node around each node of the code.
        """
        side, parent = counter, parents.get(counter)
        offset = 0
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add) and parent.left is side:
            offset = _offset_of_one(parent.right)
            side, parent = parent, parents.get(parent)
        if not isinstance(parent, ast.Compare) or len(parent.comparators) != 1:
            return False
        other = parent.comparators[0] if parent.left is side else parent.left
        if isinstance(other, ast.BinOp) and isinstance(other.op, ast.Sub):
            offset += _offset_of_one(other.right)
            other = other.left
        return offset == 1 and self._length(other) in self._lengths

    def _length(self, expression: ast.AST | None) -> str | None:
        """A number in one form: `x.shape[0]` for `x.size(0)`, `len(x)` and a variable with this value."""
        if expression is None or any(isinstance(n, ast.Name) and n.id in self._changed for n in ast.walk(expression)):
            return None
        if isinstance(expression, ast.Name):
            return self._values.get(expression.id, expression.id)
        return _form(expression)


def _form(expression: ast.AST) -> str | None:
    if isinstance(expression, ast.Name | ast.Attribute):
        return ast.unparse(expression)
    if isinstance(expression, ast.Subscript) and isinstance(expression.value, ast.Attribute):
        return ast.unparse(expression) if expression.value.attr == "shape" else None
    if isinstance(expression, ast.Call) and len(expression.args) == 1 and not expression.keywords:
        function, argument = expression.func, expression.args[0]
        if isinstance(function, ast.Name) and function.id == "len":
            return f"{ast.unparse(argument)}.shape[0]"
        if isinstance(function, ast.Attribute) and function.attr == "size":
            return f"{ast.unparse(function.value)}.shape[{ast.unparse(argument)}]"
    return None


def _iterated_length(target: ast.AST, iterated: ast.AST) -> ast.AST | None:
    """The length of `range(n)` and of `enumerate(x)`."""
    if not isinstance(iterated, ast.Call) or not isinstance(iterated.func, ast.Name) or iterated.keywords:
        return None
    if len(iterated.args) != 1:
        return None
    if iterated.func.id == "range":
        return iterated.args[0]
    if iterated.func.id == "enumerate" and isinstance(target, ast.Tuple):
        return ast.parse(f"len({ast.unparse(iterated.args[0])})", mode="eval").body
    return None


def _function_around(tree: ast.AST, loop: ast.AST) -> ast.AST:
    """The innermost function with a loop in it."""
    found = tree
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(n is loop for n in ast.walk(node)):
            found = node
    return found


def _assigned_names(trees: Iterable[ast.AST]) -> Iterator[str]:
    """The names that some code assigns, with repetitions."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _offset_of_one(node: ast.AST) -> int:
    """1 for the number 1, and 2 for all other expressions."""
    return 1 if isinstance(node, ast.Constant) and node.value == 1 else 2


def _values_of_names(function: ast.AST) -> dict[str, str]:
    """The sizes that variables are, where a function assigns them once and never the tensor."""
    stored = list(_assigned_names([function]))
    found: dict[str, str] = {}

    def note(name: ast.AST, value: str | None) -> None:
        if isinstance(name, ast.Name) and value is not None and stored.count(name.id) == 1:
            source = ast.parse(value, mode="eval")
            if not any(isinstance(n, ast.Name) and n.id in stored for n in ast.walk(source)):
                found[name.id] = value

    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple):
            shape = _shape(value)
            if shape is not None and not any(isinstance(e, ast.Starred) for e in target.elts):
                for i, element in enumerate(target.elts):
                    note(element, f"{shape}[{i}]")
            elif isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                for element, part in zip(target.elts, value.elts, strict=True):
                    note(element, _form(part))
        else:
            note(target, _form(value))
    return found


def _shape(value: ast.AST) -> str | None:
    """`x.shape` for `x.shape` and `x.size()`."""
    if isinstance(value, ast.Attribute) and value.attr == "shape":
        return ast.unparse(value)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "size":
        return f"{ast.unparse(value.func.value)}.shape" if not value.args else None
    return None
