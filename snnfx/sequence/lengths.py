"""Prove that calls of two lengths run the same code, and make their numbers functions of the length.

The call is captured at two lengths. After re-rolling, both graphs must have the same nodes; where an argument is a
number that differs, it becomes an expression of T, the size of the time dimension.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from snnfx.ir.facts import VALUE, WHERE
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.ops.elements import at_least, read_elements
from snnfx.ops.run_loop import LoopHandle
from snnfx.ops.step_functions import expect_size
from snnfx.sequence.length_uses import hides_length
from snnfx.sequence.roles import DependsOnLength, Differs, operation

__all__ = ["Lengths", "make_length_variable", "require_same_step"]


@dataclass(frozen=True)
class Lengths:
    """The two lengths of a capture, and the dimension that they are the size of.

    Args:
        short, long: the lengths.
        leaf: the index of the input.
        dim: its time dimension.
    """

    short: int
    long: int
    leaf: int
    dim: int


def require_same_step(short: StepProgram, long: StepProgram) -> None:
    """Check that the step of a loop is the same at both lengths.

    Raises:
        Differs: it is not.
    """

    def refuse(node: Node, a: Any, b: Any) -> Any:
        raise DependsOnLength(f"`{describe_node(node)}` uses a number that depends on the number of time steps", node)

    _Comparison(short, long, refuse).run()


def make_length_variable(short: StepProgram, long: StepProgram, lengths: Lengths) -> None:
    """Replace the numbers of the shorter call that depend on its length by expressions of the length.

    Args:
        short: the program of the shorter call, which is changed.
        long: the program of the longer call.
        lengths: the two lengths.

    Raises:
        Differs: the programs differ in more than such numbers; nothing is changed.
    """
    changes: list[tuple[Node, Any, Any]] = []
    checks: list[Node] = []

    def lift(node: Node, a: Any, b: Any) -> Any:
        if node.target is expect_size and (a, b) == (lengths.short, lengths.long):
            where = WHERE.of(node)
            if where is not None and hides_length(*where):
                raise Differs("the code around the call of `len` or `int` may branch on the number or round it", node)
            checks.append(node)
            return a
        expression = _expression(a, b, lengths)
        if expression is None:
            raise Differs(f"an argument of `{describe_node(node)}` is {a!r} for T = {lengths.short}, else {b!r}", node)
        return _OfLength(expression)

    comparison = _Comparison(short, long, lift)
    comparison.run()
    changes = comparison.changes
    graph = short.graph
    if changes:
        source = short.input_nodes()[lengths.leaf]
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            shape = graph.call_function(getattr, (source, "shape"))
            length = graph.call_function(operator.getitem, (shape, lengths.dim))
        value = VALUE.of(source)
        shape.meta = {"shape_like": True, "module": "", "val": value.shape if isinstance(value, Tensor) else None}
        length.meta = {"shape_like": True, "module": "", "val": lengths.short}
        for node, args, kwargs in changes:
            with graph.inserting_before(node):
                node.args = _resolved(args, graph, length)
                node.kwargs = _resolved(kwargs, graph, length)
        _require_separate_iterations(graph, length)
    for node in checks:
        graph.erase_node(node)


def _require_separate_iterations(graph: fx.Graph, length: Node) -> None:
    """Check the number of time steps where a loop runs T - 2 iterations or fewer."""
    counts = [n.args[4] for n in graph.nodes if n.target is read_elements]
    offsets = [c.args[1] for c in counts if isinstance(c, Node) and c.target is operator.add and c.args[0] is length]
    least = max([-k for k in offsets if isinstance(k, int)], default=0)
    if least < 2:
        return
    with graph.inserting_after(length):
        checked = graph.call_function(at_least, (length, least))
    checked.meta = dict(length.meta)
    length.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)


@dataclass(frozen=True)
class _OfLength:
    """A number as an expression of the length."""

    expression: Callable[[Any, Node], Node]


def _expression(a: Any, b: Any, lengths: Lengths) -> Callable[[Any, Node], Node] | None:
    """The expression of T with the value `a` for the shorter and `b` for the longer call."""
    for x in (a, b):
        if isinstance(x, bool) or not isinstance(x, int | float):
            return None
    if isinstance(a, int) and isinstance(b, int):
        slope, rest = divmod(b - a, lengths.long - lengths.short)
        if rest:
            return _quotient(a, b, lengths)
        offset = a - slope * lengths.short

        def affine(graph: Any, length: Node) -> Node:
            node = length if slope == 1 else _number(graph, operator.mul, length, slope)
            return node if offset == 0 else _number(graph, operator.add, node, offset)

        return affine
    if abs(a * lengths.short - b * lengths.long) < 1e-12 * abs(a * lengths.short):
        return lambda graph, length: _number(graph, operator.truediv, a * lengths.short, length)
    if abs(a / lengths.short - b / lengths.long) < 1e-12 * abs(a / lengths.short):
        return lambda graph, length: _number(graph, operator.mul, a / lengths.short, length)
    return None


def _quotient(a: int, b: int, lengths: Lengths) -> Callable[[Any, Node], Node] | None:
    """The expression `T // q` with the value `a` for the shorter and `b` for the longer call."""
    divisor, rest = divmod(lengths.short, a) if a > 0 else (0, 1)
    if rest or divisor * b != lengths.long:
        return None
    return lambda graph, length: _number(graph, operator.floordiv, length, divisor)


def _number(graph: Any, function: Any, a: Any, b: Any) -> Node:
    node: Node = graph.call_function(function, (a, b))
    values = [VALUE.of(n) if isinstance(n, Node) else n for n in (a, b)]
    node.meta = {"shape_like": True, "module": "", "val": function(*values)}
    return node


def _resolved(tree: Any, graph: Any, length: Node) -> Any:
    if isinstance(tree, _OfLength):
        return tree.expression(graph, length)
    if isinstance(tree, tuple):
        values = [_resolved(v, graph, length) for v in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if isinstance(tree, list):
        return [_resolved(v, graph, length) for v in tree]
    if isinstance(tree, dict):
        return {k: _resolved(v, graph, length) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(_resolved(v, graph, length) for v in (tree.start, tree.stop, tree.step)))
    return tree


class _Comparison:
    """Compares two programs node by node."""

    def __init__(self, a: StepProgram, b: StepProgram, differs: Callable[[Node, Any, Any], Any]) -> None:
        self.a, self.b, self.differs = a, b, differs
        self.matched: dict[Node, Node] = {}
        self.changes: list[tuple[Node, Any, Any]] = []
        """Nodes of `a` with new `(args, kwargs)`."""

    def run(self) -> None:
        nodes_a, nodes_b = list(self.a.graph.nodes), list(self.b.graph.nodes)
        for a, b in zip(nodes_a, nodes_b, strict=False):
            is_attribute = a.op == b.op == "get_attr"
            is_placeholder = a.op == b.op == "placeholder"
            if not is_placeholder and not (self._same_constant(a, b) if is_attribute else operation(a) == operation(b)):
                raise Differs(f"the call runs `{describe_node(a)}` or `{describe_node(b)}`, depending on its length", a)
            self.matched[a] = b
            args = self._compare(a, a.args, b.args)
            kwargs = self._compare(a, a.kwargs, b.kwargs)
            if _has_lengths(args) or _has_lengths(kwargs):
                self.changes.append((a, args, kwargs))
        if len(nodes_a) != len(nodes_b):
            raise Differs("the call runs other operations, depending on its length", None)

    def _same_constant(self, a: Node, b: Node) -> bool:
        x, y = self.a.resolve(str(a.target)), self.b.resolve(str(b.target))
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x is y or (x.shape == y.shape and x.dtype == y.dtype and bool((x == y).all()))
        if isinstance(x, LoopHandle) and isinstance(y, LoopHandle):
            return a.target == b.target
        function = getattr(x, "function", None)
        return x is y or (function is not None and function is getattr(y, "function", None))

    def _compare(self, node: Node, a: Any, b: Any) -> Any:
        if isinstance(a, Node) or isinstance(b, Node):
            if not isinstance(a, Node) or not isinstance(b, Node) or self.matched.get(a) is not b:
                raise Differs(f"the operands of `{describe_node(node)}` depend on the length of the call", node)
            return a
        if isinstance(a, tuple | list):
            if type(a) is not type(b) or len(a) != len(b):
                raise Differs(f"`{describe_node(node)}` has one argument for each time step", node)
            parts = [self._compare(node, x, y) for x, y in zip(a, b, strict=True)]
            if hasattr(a, "_fields"):
                return type(a)(*parts)
            return tuple(parts) if isinstance(a, tuple) else parts
        if isinstance(a, dict):
            if not isinstance(b, dict) or a.keys() != b.keys():
                raise Differs(f"the arguments of `{describe_node(node)}` depend on the length of the call", node)
            return {k: self._compare(node, a[k], b[k]) for k in a}
        if isinstance(a, slice) and isinstance(b, slice):
            pairs = zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True)
            return slice(*(self._compare(node, x, y) for x, y in pairs))
        if type(a) is type(b) and (a == b or (a != a and b != b)):
            return a
        return self.differs(node, a, b)


def _has_lengths(tree: Any) -> bool:
    if isinstance(tree, _OfLength):
        return True
    if isinstance(tree, tuple | list):
        return any(_has_lengths(v) for v in tree)
    if isinstance(tree, dict):
        return any(_has_lengths(v) for v in tree.values())
    return isinstance(tree, slice) and any(_has_lengths(v) for v in (tree.start, tree.stop, tree.step))
