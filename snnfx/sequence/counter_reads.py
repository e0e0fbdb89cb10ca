"""Find loops whose code decides by the number of the iteration, which a capture of a few iterations cannot see.

`if t == 100: ...` runs the same code in the first iterations. The number is a plain Python int, so its comparisons
leave no trace in the graph; the source code of the loop shows them.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator

from snnfx.capture.iteration_tracking import LoopSource

__all__ = ["may_branch_on_count"]


def may_branch_on_count(source: LoopSource) -> bool:
    """Whether the code of a loop may branch on a number that counts its iterations; True if it is unknown."""
    tree = _parsed(source.filename)
    loop = _loop_at(tree, source) if tree is not None else None
    if loop is None:
        return True
    if isinstance(loop, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        tests: list[ast.AST] = [test for g in loop.generators for test in g.ifs]
        bodies: list[ast.AST] = [loop.elt] if not isinstance(loop, ast.DictComp) else [loop.key, loop.value]
        counters = {n for g in loop.generators for n in _counters_of_target(g.target, g.iter, bodies)}
    else:
        tests, bodies = [], list(loop.body)
        counters = set(_counters_of_target(loop.target, loop.iter, bodies)) if isinstance(loop, ast.For) else set()
    for node in _nodes(bodies):
        if (
            isinstance(node, ast.AugAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Constant)
        ):
            counters.add(node.target.id)
    for node in _nodes(bodies):  # names computed from counters
        if not isinstance(node, ast.Assign) or _has_call_or_subscript(node.value):
            continue
        if _uses(node.value, counters):
            counters |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in _nodes(bodies):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            tests.append(node.test)
        elif isinstance(node, ast.BoolOp):
            tests += node.values
        elif isinstance(node, ast.Match):
            tests.append(node.subject)
        elif isinstance(node, ast.Compare) or (
            isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.FloorDiv)
        ):
            tests.append(node)  # `t // 10` is the same number in the first iterations
        elif isinstance(node, ast.Subscript) and _is_of_self(node.value):
            tests.append(node.slice)  # `self.thresholds[t]`, a list whose first elements may be equal
    if any(_uses(test, counters) for test in tests):
        return True
    # A function that gets the number may branch on it.
    calls = [node for node in _nodes(bodies) if isinstance(node, ast.Call)]
    return any(
        isinstance(argument, ast.Name) and argument.id in counters
        for call in calls
        if not _is_of_torch(call)
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
    )


@functools.lru_cache(maxsize=64)
def _parsed(filename: str) -> ast.Module | None:
    lines = linecache.getlines(filename)
    try:
        return ast.parse("".join(lines)) if lines else None
    except SyntaxError:
        return None


_Loop = ast.For | ast.While | ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


def _loop_at(tree: ast.Module, source: LoopSource) -> _Loop | None:
    """The innermost loop that the first instruction of the loop belongs to."""
    found: _Loop | None = None
    for node in ast.walk(tree):
        if not isinstance(node, _Loop) or not _contains(node, source.line, source.column):
            continue
        if found is None or (node.lineno, node.col_offset) >= (found.lineno, found.col_offset):
            found = node
    return found


def _contains(node: _Loop, line: int, column: int) -> bool:
    start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    return start <= (line, column) <= end


def _counters_of_target(target: ast.AST, iterated: ast.AST, bodies: list[ast.AST]) -> Iterator[str]:
    """The loop variables that may be numbers: those of `range(...)` and `enumerate(...)`, and indices in the body."""
    names = {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    functions = {
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(iterated)
        if isinstance(n, ast.Name | ast.Attribute)
    }
    if functions & {"range", "count"}:
        yield from names
    elif "enumerate" in functions and isinstance(target, ast.Tuple) and target.elts:
        yield from (n.id for n in ast.walk(target.elts[0]) if isinstance(n, ast.Name))
    for node in _nodes(bodies):
        if isinstance(node, ast.Subscript):
            yield from (n.id for n in ast.walk(node.slice) if isinstance(n, ast.Name) and n.id in names)


def _nodes(trees: list[ast.AST]) -> Iterator[ast.AST]:
    for tree in trees:
        yield from ast.walk(tree)


def _uses(tree: ast.AST, names: set[str]) -> bool:
    return any(isinstance(node, ast.Name) and node.id in names for node in ast.walk(tree))


def _has_call_or_subscript(tree: ast.AST) -> bool:
    return any(isinstance(n, ast.Call | ast.Subscript) for n in ast.walk(tree))


def _is_of_self(tree: ast.AST) -> bool:
    """Whether an expression is an attribute of the module: `self.w`."""
    while isinstance(tree, ast.Attribute | ast.Subscript):
        tree = tree.value
    return isinstance(tree, ast.Name) and tree.id == "self"


def _is_of_torch(call: ast.Call) -> bool:
    """Whether a call is one of torch or of a tensor: `torch.f(...)`, `F.f(...)`, `x.select(0, t)`."""
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in ("range", "float", "int", "print", "len")
    return isinstance(function, ast.Attribute) and (
        (isinstance(function.value, ast.Name) and function.value.id in ("torch", "F"))
        or function.attr in ("select", "narrow", "index_select", "append")
    )
