"""Fit the first iteration of a loop to the step of the later ones.

Its carried values come from outside the loop or from nodes that only it has. Python may have evaluated its operations
on numbers, and it may lack the terms of earlier steps, which are zero: `v = x` in front of `v = decay * v + x`.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch.fx import Node

from snnfx.ir.module_effects import updates_buffers
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.sequence.roles import Carried, Differs, Outside, Own, Varying, has_type_of, map_roles, operation

__all__ = ["fit_first"]

_UNKNOWN = object()


def fit_first(
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
        """The operands of sums with zero, by position: of `v = decay * v + x` where the first iteration has `v = x`."""

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
        is_of_numbers = node.op == "call_function" and getattr(node.target, "__module__", "") in _NUMBER_MODULES
        if not is_detached and not is_of_numbers:
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
            kind = list if isinstance(expected, list) else type(expected)  # graphs have lists of a type of their own
            return (
                isinstance(actual, kind)
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
