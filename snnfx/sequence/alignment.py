"""Prove that the iterations of a loop run the same step.

The iterations are compared node by node. An argument is then one of: a value of the same iteration, a value of the
previous iteration (carried), a value from outside the loop, a value from outside that differs from iteration to
iteration (an element of a sequence), or a constant. The first iteration may start differently: its carried values come
from outside the loop or from nodes that only it has, and Python may have evaluated its operations on numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.ir.module_effects import updates_buffers
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import StepProgram

__all__ = ["Alignment", "Carried", "Differs", "Outside", "Own", "Varying", "align", "has_type_of", "map_roles"]


class Differs(Exception):
    """The iterations do not run the same step.

    Args:
        why: the difference, as a clause.
        node: the node where they differ.
    """

    def __init__(self, why: str, node: Node | None = None) -> None:
        super().__init__(why)
        self.why, self.node = why, node

    @property
    def location(self) -> str:
        """The user's file and line."""
        return location_of(self.node) if self.node is not None else ""


@dataclass(frozen=True)
class Own:
    """The value at a position of the same iteration."""

    position: int


@dataclass(frozen=True)
class Carried:
    """The value at a position of the previous iteration."""

    position: int


@dataclass(frozen=True)
class Outside:
    """A value from outside the loop, the same in each iteration."""

    node: Node


@dataclass(frozen=True)
class Varying:
    """Values from outside the loop, or numbers, one for each iteration."""

    values: tuple[Any, ...]


@dataclass
class Alignment:
    """The common step of the iterations of a loop.

    Args:
        bodies: the nodes of each iteration.
        template: the nodes of one iteration; positions are indices into it.
        arguments: `(args, kwargs)` of each position, with roles instead of nodes.
        first: the value of each position in the first iteration: a node, or a number that Python evaluated.
        initial: the values before the first iteration, by carried position.
    """

    bodies: list[list[Node]]
    template: list[Node]
    arguments: list[tuple[Any, Any]]
    first: list[Any]
    initial: dict[int, Any]

    def value(self, iteration: int, position: int) -> Any:
        """The value at a position of an iteration."""
        return self.first[position] if iteration == 0 else self.bodies[iteration][position]

    @property
    def count(self) -> int:
        """The number of iterations."""
        return len(self.bodies)


def map_roles(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to all roles in nested arguments."""
    if isinstance(tree, Own | Carried | Outside | Varying):
        return function(tree)
    if isinstance(tree, tuple):
        values = [map_roles(v, function) for v in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if isinstance(tree, list):
        return [map_roles(v, function) for v in tree]
    if isinstance(tree, dict):
        return {k: map_roles(v, function) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_roles(v, function) for v in (tree.start, tree.stop, tree.step)))
    return tree


def align(program: StepProgram, bodies: list[list[Node]]) -> Alignment:
    """Find the common step of the iterations.

    Raises:
        Differs: they do not run the same step, the first apart from its start.
    """
    if len(bodies) < 2:
        raise Differs("it has a single iteration", bodies[0][0] if bodies and bodies[0] else None)
    later = _Later(bodies)
    arguments = later.arguments()
    first, initial, added = _fit_first(program, bodies, arguments, later.before)
    if len(bodies) == 2 and any(not isinstance(v, Node) for v in first):
        raise Differs("two iterations are too few to compare", bodies[1][0])
    for position, (args, kwargs) in enumerate(arguments):
        fitted = first[position]
        if position in added:
            actual: tuple[Any, Any] = (added[position], {})
        elif isinstance(fitted, Node):
            actual = (fitted.args, fitted.kwargs)
        else:
            continue
        arguments[position] = _with_first_values((args, kwargs), actual)
    return Alignment(bodies, list(bodies[1]), arguments, first, initial)


class _Later:
    """Compares all iterations but the first."""

    def __init__(self, bodies: list[list[Node]]) -> None:
        self.bodies = bodies[1:]
        self.place = {node: (i, p) for i, body in enumerate(bodies) for p, node in enumerate(body)}
        self.before: dict[int, Any] = {}
        """The value before the second iteration, by carried position."""

    def arguments(self) -> list[tuple[Any, Any]]:
        template = self.bodies[0]
        for body in self.bodies[1:]:
            for a, b in zip(template, body, strict=False):
                if operation(a) != operation(b):
                    raise Differs(f"one iteration runs `{describe_node(a)}`, another `{describe_node(b)}`", b)
            if len(body) != len(template):
                longer = max(body, template, key=len)
                extra = longer[min(len(body), len(template))]
                raise Differs(f"only some iterations run `{describe_node(extra)}`", extra)
        return [
            (
                self._combine([body[p].args for body in self.bodies], template[p]),
                self._combine([body[p].kwargs for body in self.bodies], template[p]),
            )
            for p in range(len(template))
        ]

    def _combine(self, values: list[Any], node: Node) -> Any:
        """The role of the arguments at one place, one value for each iteration."""
        sample = values[0]
        if any(isinstance(v, Node) for v in values):
            return self._role(values, node)
        if isinstance(sample, tuple | list):
            if any(type(v) is not type(sample) or len(v) != len(sample) for v in values):
                raise Differs(f"the arguments of `{describe_node(node)}` grow from iteration to iteration", node)
            parts = [self._combine(list(part), node) for part in zip(*values, strict=True)]
            if isinstance(sample, tuple) and hasattr(sample, "_fields"):
                return type(sample)(*parts)
            return tuple(parts) if isinstance(sample, tuple) else parts
        if isinstance(sample, dict):
            if any(not isinstance(v, dict) or v.keys() != sample.keys() for v in values):
                raise Differs(f"the arguments of `{describe_node(node)}` differ", node)
            return {k: self._combine([v[k] for v in values], node) for k in sample}
        if isinstance(sample, slice):
            parts = [
                self._combine(list(p), node) for p in zip(*((v.start, v.stop, v.step) for v in values), strict=True)
            ]
            return slice(*parts)
        if all(type(v) is type(sample) and (v == sample or (v != v and sample != sample)) for v in values):
            return sample
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return Varying(tuple(values))
        raise Differs(f"an argument of `{describe_node(node)}` is {values[0]!r}, then {values[-1]!r}", node)

    def _role(self, values: list[Any], node: Node) -> Any:
        places = [self.place.get(v) if isinstance(v, Node) else None for v in values]
        own = places[0]
        if own is not None and all(p == (i, own[1]) for i, p in enumerate(places, 1)):
            return Own(own[1])
        if len(values) > 1:
            carried = places[1]
            if carried is not None and all(p == (i - 1, carried[1]) for i, p in enumerate(places[1:], 2)):
                return self._carried(carried[1], values[0], node)
        elif own is not None and own[0] == 0:
            raise Differs("two iterations are too few to compare", node)
        if all(p is None for p in places):
            if all(v is values[0] for v in values):
                return Outside(values[0])
            if all(isinstance(v, Node) for v in values):
                return Varying(tuple(values))
        raise Differs(f"`{describe_node(node)}` reads a value of an iteration before the previous one", node)

    def _carried(self, position: int, before: Any, node: Node) -> Carried:
        known = self.before.setdefault(position, before)
        if known is not before:
            raise Differs(f"`{describe_node(node)}` starts from two values", node)
        return Carried(position)


_UNKNOWN = object()


def _fit_first(
    program: StepProgram, bodies: list[list[Node]], arguments: list[tuple[Any, Any]], before: dict[int, Any]
) -> tuple[list[Any], dict[int, Any], dict[int, tuple[Any, ...]]]:
    """Fit the first iteration to the step, with states that start as None, a recorded value, or zero."""
    difference: Differs | None = None
    for zero in (None, 0.0, 0):
        try:
            return _First(program, bodies[0], bodies[1], arguments, before, zero).fitted()
        except Differs as error:
            difference = difference or error
    assert difference is not None
    raise difference


class _First:
    """Fits the first iteration to the step of the later ones."""

    def __init__(
        self,
        program: StepProgram,
        body: list[Node],
        template: list[Node],
        arguments: list[tuple[Any, Any]],
        before: dict[int, Any],
        zero: float | None = None,
    ) -> None:
        self.program, self.body, self.template, self.zero = program, body, template, zero
        self.arguments, self.before = arguments, before
        self.inside = set(body)
        self.values: list[Any] = []
        self.initial: dict[int, Any] = {}
        self.added: dict[int, tuple[Any, ...]] = {}
        """The operands of sums with zero, by position: the first iteration starts with `v = x`, not `v = decay * v + x`."""

    def fitted(self) -> tuple[list[Any], dict[int, Any], dict[int, tuple[Any, ...]]]:
        """`(value of each position, initial values of carried positions, operands of sums with zero)`."""
        next_node = 0
        for position, node in enumerate(self.template):
            evaluated = self._evaluate(position)
            if evaluated is not _UNKNOWN:
                self.values.append(evaluated)
                continue
            for index in range(next_node, len(self.body)):
                candidate = self.body[index]
                known = dict(self.initial)
                if operation(candidate) == operation(node) and self._unify(
                    self.arguments[position], (candidate.args, candidate.kwargs)
                ):
                    self.values.append(candidate)
                    next_node = index + 1
                    break
                self.initial = known
            else:
                evaluated = self._evaluate(position, assume_zero=True)
                if evaluated is _UNKNOWN:
                    raise Differs(f"the first iteration does not run `{describe_node(node)}`", node)
                self.values.append(evaluated)
        for position, before in self.before.items():
            value = self.values[position]
            if value is not before and not (not isinstance(value, Node) and value == before):
                raise Differs("the second iteration starts from another value than the first returns", None)
        self._check_extra_nodes()
        return self.values, self.initial, self.added

    def _check_extra_nodes(self) -> None:
        fitted = {v for v in self.values if isinstance(v, Node)}
        extra = [n for n in self.body if n not in fitted]
        for node in extra:
            if updates_buffers(self.program, node):
                raise Differs(f"only the first iteration runs `{describe_node(node)}`", node)
            for user in node.users:
                if user not in self.inside and user.op != "output":
                    raise Differs(f"only the first iteration runs `{describe_node(node)}`", node)

    def _evaluate(self, position: int, assume_zero: bool = False) -> Any:
        """The number that Python evaluated in the first iteration, where the later ones have a node.

        Args:
            position: the node.
            assume_zero: whether a state of unknown start is assumed to start as zero, as in `mem = 0` with
                `mem = 0.5 * mem + x`. The nodes that read the result prove it.
        """
        node = self.template[position]
        is_detached = node.op == "call_method" and node.target == "detach"
        if not is_detached and (node.op != "call_function" or getattr(node.target, "__module__", "") not in _NUMBER_MODULES):
            return _UNKNOWN
        from_state = False
        is_known = True

        def resolve(role: Any) -> Any:
            nonlocal from_state, is_known
            value = _UNKNOWN
            if isinstance(role, Own):
                value = self.values[role.position]
            elif isinstance(role, Carried):
                value = self.initial.get(role.position, _UNKNOWN)
                if value is _UNKNOWN and assume_zero and self.zero is not None:
                    value = self.initial[role.position] = self.zero
            elif isinstance(role, Varying) and assume_zero:
                value = _element_before(role)
            if value is _UNKNOWN or isinstance(value, Node) or not isinstance(value, int | float):
                is_known = False
            from_state = True
            return value

        args, kwargs = map_roles(self.arguments[position], resolve)
        if not from_state:
            return _UNKNOWN
        if not is_known:
            return self._summand(position, args) if assume_zero and not kwargs else _UNKNOWN
        return args[0] if is_detached else node.target(*args, **kwargs)  # type: ignore[operator]

    def _summand(self, position: int, args: tuple[Any, ...]) -> Any:
        """The value that a sum with zero adds: both have the type of the sum."""
        node = self.template[position]
        if len(args) != 2 or node.target not in (operator.add, operator.sub):
            return _UNKNOWN
        a, b = args
        value = a if _is_zero(b) else b if _is_zero(a) and node.target is operator.add else None
        if not isinstance(value, Node) or not has_type_of(value, node):
            return _UNKNOWN
        self.added[position] = args
        return value

    def _unify(self, expected: Any, actual: Any) -> bool:
        """Whether arguments of the first iteration fit the roles; binds the initial values of carried positions."""
        if isinstance(expected, Own):
            return _same(self.values[expected.position], actual)
        if isinstance(expected, Carried):
            if expected.position in self.initial:
                return _same(self.initial[expected.position], actual)
            if isinstance(actual, tuple | list | dict | slice):
                return False
            self.initial[expected.position] = actual
            return True
        if isinstance(expected, Outside):
            return expected.node is actual
        if isinstance(expected, Varying):
            if isinstance(expected.values[0], Node):
                return isinstance(actual, Node) and actual not in self.inside
            return isinstance(actual, int | float)
        if isinstance(expected, tuple | list):
            return (
                type(actual) is type(expected)
                and len(actual) == len(expected)
                and all(self._unify(e, a) for e, a in zip(expected, actual, strict=True))
            )
        if isinstance(expected, dict):
            return (
                isinstance(actual, dict)
                and actual.keys() == expected.keys()
                and all(self._unify(expected[k], actual[k]) for k in expected)
            )
        if isinstance(expected, slice):
            return isinstance(actual, slice) and self._unify(
                (expected.start, expected.stop, expected.step), (actual.start, actual.stop, actual.step)
            )
        return _same(expected, actual)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def has_type_of(value: Node, like: Node) -> bool:
    """Whether two nodes are tensors of one shape and dtype."""
    a, b = value.meta.get("val"), like.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _element_before(role: Varying) -> Any:
    """The element of a sequence before those that the later iterations read: of `x.unbind()`."""
    nodes = role.values
    if len(nodes) < 2 or any(not isinstance(n, Node) or n.target is not operator.getitem for n in nodes):
        return _UNKNOWN
    (source, first), (other, second) = nodes[0].args, nodes[1].args
    if source is not other or not isinstance(first, int) or not isinstance(second, int):
        return _UNKNOWN
    elements = {n.args[1]: n for n in source.users if n.target is operator.getitem and isinstance(n.args[1], int)}
    return elements.get(2 * first - second, _UNKNOWN)


_NUMBER_MODULES = ("_operator", "builtins", "math", math.__name__)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _with_first_values(expected: Any, actual: Any) -> Any:
    """Add the value of the first iteration to all `Varying` roles."""
    if isinstance(expected, Varying):
        return Varying((actual, *expected.values))
    if isinstance(expected, tuple) and hasattr(expected, "_fields"):
        return type(expected)(*(_with_first_values(e, a) for e, a in zip(expected, actual, strict=True)))
    if isinstance(expected, tuple | list):
        return type(expected)(_with_first_values(e, a) for e, a in zip(expected, actual, strict=True))
    if isinstance(expected, dict):
        return {k: _with_first_values(v, actual[k]) for k, v in expected.items()}
    if isinstance(expected, slice):
        parts = ((expected.start, actual.start), (expected.stop, actual.stop), (expected.step, actual.step))
        return slice(*(_with_first_values(e, a) for e, a in parts))
    return expected


_METHODS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


def operation(node: Node) -> tuple[str, Any]:
    """The operation of a node; `tensor + proxy` is recorded as a method, `proxy + proxy` as an operator."""
    if node.op == "call_method" and node.target in _METHODS and not node.kwargs:
        return "call_function", _METHODS[str(node.target)]
    return node.op, node.target
